"""Arrays and replies, checked where they enter."""
