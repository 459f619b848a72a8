//! Python bindings of birkhoff-core.
