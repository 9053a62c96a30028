"""One file per op: schema, plain-torch reference, fake, shape checks and the rule that picks a route."""
