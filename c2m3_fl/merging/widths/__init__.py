"""Networks of one architecture and different widths: matched by injections into the widest, averaged per entry."""
