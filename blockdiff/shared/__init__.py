"""What both ends of a connection use: errors, blocks, frames, processes and threads. Shipped to the host."""
