//! Decode and multiply in one operator.
