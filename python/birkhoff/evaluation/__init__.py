"""How well a compressed model keeps the masks of its original."""
