"""Who chooses among the candidates for deployment, and by what evidence."""
