"""The few operators that must be opaque to the compiler, or replaceable per device."""
