"""What both ends of a connection know: errors, blocks, frames, processes and threads. Shipped to the host."""
