//! The rules by which nodes share a volume: lease, election, fence, ownership. Pure, and model-checked.
