"""Communication-efficient training for JAX: optax transforms, compressed collectives, a meter."""
