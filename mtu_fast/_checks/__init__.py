"""What a user hands over: made uniform, or refused by an error that names the argument."""
