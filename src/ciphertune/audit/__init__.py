"""What an attacker makes of the bytes the server got; one file per published attack."""
