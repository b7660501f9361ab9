//! The bascule.dev/v1alpha1 API: its kinds as Rust types, and their CustomResourceDefinitions.
