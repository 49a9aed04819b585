//! Nodes and transport: the only room that knows clients.
