"""The demonstration behind ``pared demo``: real models from dense to pruned, converted and measured."""
