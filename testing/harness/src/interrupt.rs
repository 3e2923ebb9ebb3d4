//! Ctrl-C that lets guards clean up.

#[cfg(target_os = "linux")]
mod below;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether this process was asked to end. Everything that waits or works for long checks it, so
/// that guards clean up.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on SIGINT and SIGTERM only set the flag; a second one ends the process at once.
    pub fn catch() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(
                signal,
                130,
                Arc::clone(&interrupt.0),
            )?;
            signal_hook::flag::register(signal, Arc::clone(&interrupt.0))?;
        }
        Ok(interrupt)
    }

    /// From now on a first SIGINT or SIGTERM does not end this process, but what it waits for.
    /// SIGTERM is passed on to what runs below it (on Linux). SIGINT is not, because a terminal
    /// sends it to all of them. A second signal ends this process at once.
    pub fn pass_on() -> anyhow::Result<Self> {
        let interrupt = Self::catch()?;
        #[cfg(target_os = "linux")]
        below::end_on_sigterm()?;
        Ok(interrupt)
    }

    /// As a signal does.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn check(&self) -> anyhow::Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }
}
