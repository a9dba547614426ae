//! Ten thousand hosts: how fast, how many bytes, how much memory. Filled in by `cargo xtask sim --flock --hosts N`.
