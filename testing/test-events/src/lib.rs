//! Collects the events of the crate `tracing` as text, for tests.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::Subscriber;
use tracing_subscriber::filter::LevelFilter;

/// Returns the events of all levels that `work` emits on this thread, one a line, without the time.
pub fn captured(work: impl FnOnce()) -> String {
    let events = Events::default();
    tracing::subscriber::with_default(events.subscriber(), work);
    events.text()
}

/// Collects the events of all threads of this process from now on.
///
/// # Panics
/// Panics on the second call in a process.
#[must_use]
pub fn capture_all() -> Events {
    let events = Events::default();
    let set = tracing::subscriber::set_global_default(events.subscriber());
    set.expect("one test per process collects all events");
    events
}

/// The events that were collected so far.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Mutex<Vec<u8>>>);

impl Events {
    fn subscriber(&self) -> impl Subscriber + Send + Sync + use<> {
        let events = self.clone();
        tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_ansi(false)
            .without_time()
            .with_writer(move || events.clone())
            .finish()
    }

    /// Returns the events, one a line.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl io::Write for Events {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
