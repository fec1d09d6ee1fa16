"""Refit from clients: what each is asked, measures and sends; the answers pooled, and every operator solved."""
