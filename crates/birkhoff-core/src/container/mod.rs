//! The safetensors file.
