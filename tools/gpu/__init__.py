"""What can be known of a GPU without one: limits, costs, others' measurements, a model of a step."""
