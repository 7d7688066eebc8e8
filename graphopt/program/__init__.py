"""What `compile` makes: the program, its options, the saved form."""
