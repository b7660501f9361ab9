//! A map from small integer keys to items; keys are reused after removal.

#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self {
            items: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn insert(&mut self, item: T) -> usize {
        if let Some(key) = self.free.pop() {
            self.items[key] = Some(item);
            return key;
        }
        self.items.push(Some(item));
        self.items.len() - 1
    }

    pub(super) fn get_mut(&mut self, key: usize) -> Option<&mut T> {
        self.items.get_mut(key)?.as_mut()
    }

    pub(super) fn get(&self, key: usize) -> Option<&T> {
        self.items.get(key)?.as_ref()
    }

    pub(super) fn remove(&mut self, key: usize) -> Option<T> {
        let item = self.items.get_mut(key)?.take()?;
        self.free.push(key);
        Some(item)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.items.len()
    }

    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.free.clear();
    }
}
