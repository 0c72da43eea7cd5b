"""The model cut across ranks from outside: what each rank holds of a layer, and how the ranks compute it together."""
