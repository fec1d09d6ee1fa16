"""Ways to bring nodes into one basis before they are averaged."""
