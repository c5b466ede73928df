//! Clients that are made when they are first needed.

use std::sync::Arc;

use crate::error::Result;

/// A client that is made when it is first needed: reading the system's certificates takes longer than a request.
#[derive(Clone)]
pub struct Lazy<T>(Arc<dyn Fn() -> Result<T> + Send + Sync>);

impl<T: Clone + Send + Sync + 'static> Lazy<T> {
    /// `make` is called once, if it succeeds.
    pub fn new(make: impl Fn() -> Result<T> + Send + Sync + 'static) -> Self {
        let made = std::sync::OnceLock::new();
        Self(Arc::new(move || match made.get() {
            Some(client) => Ok(T::clone(client)),
            None => {
                let client = make()?;
                Ok(made.get_or_init(|| client).clone())
            }
        }))
    }

    /// The client.
    pub fn client(&self) -> Result<T> {
        (self.0)()
    }
}

impl<T> std::fmt::Debug for Lazy<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lazy")
    }
}
