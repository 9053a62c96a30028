"""From recorded losses to the uses of every parameter: the graph, its row map, rules."""
