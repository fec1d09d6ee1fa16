"""From the replies of a round to one basis."""
