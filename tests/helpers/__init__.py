"""What the tests share: the zoo of models, the truth by autograd, matrices and the one tolerance rule."""
