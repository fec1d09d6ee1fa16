"""From the aggregate of a round to the model that is deployed."""
