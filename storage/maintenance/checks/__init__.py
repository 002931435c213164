"""What the validator checks, a file for each kind of promise."""
