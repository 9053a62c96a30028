"""What holds the rows: uses, Grams and combinations of them, and the writing of `.grad`."""
