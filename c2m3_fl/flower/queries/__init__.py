"""What clients are asked about their own data, what they answer, and what the server makes of it."""
