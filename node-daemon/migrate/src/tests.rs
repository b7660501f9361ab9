//! Both sides and the volume together.

mod model;
