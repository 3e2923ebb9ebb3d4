//! The save as a future.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_backend::{Precopy, VcpuState};
use memory_writer::{CancelToken, MemoryWriter, Progress};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::guest::{self, AnyError, Guest, PAGE, RAM};

/// Live rounds end when one finds at most this many pages.
const FEW: u64 = 64;
const MAX_ROUNDS: usize = 8;

/// Saves the guest to `path`. If the future is dropped, the save ends soon, the old file stays, and
/// all pages are marked again.
pub(crate) async fn save(
    guest: Arc<Guest>,
    path: PathBuf,
    progress: watch::Sender<Progress>,
) -> Result<VcpuState, AnyError> {
    let token = CancelToken::new();
    let on_drop = token.clone().drop_guard();
    let saved = spawn_blocking(move || save_blocking(&guest, &path, &token, &progress)).await;
    let _ = on_drop.disarm();
    saved?
}

/// Saves the guest. This function blocks: it is called on a thread of its own.
pub(crate) fn save_blocking(
    guest: &Guest,
    path: &Path,
    token: &CancelToken,
    progress: &watch::Sender<Progress>,
) -> Result<VcpuState, AnyError> {
    let report = progress.clone();
    let mut writer = MemoryWriter::options()
        .cancel(token.clone())
        // Called many times a second, on the thread that writes.
        .progress(move |now| {
            report.send_replace(now);
            ControlFlow::Continue(())
        })
        .open(path, RAM, PAGE)?;
    // The VMM writes by `GuestRam::write`, which marks the pages. For other host writes, see
    // `DirtyLog::options().mark_host_writes(..)`.
    let mut precopy = Precopy::begin(&guest.log)?;
    let mut found = precopy.live_round::<AnyError>(|_| Ok(writer.write_full(&*guest.ram)?))?;
    for _ in 0..MAX_ROUNDS {
        let before = found;
        found = precopy.live_round::<AnyError>(|pages| {
            writer.write_diff(&*guest.ram, pages)?;
            Ok(())
        })?;
        if found <= FEW || found > before / 2 {
            break;
        }
    }
    let copy = precopy.finish::<_, AnyError>(
        || guest.pause(),
        |paused| guest.capture(paused),
        |pages| {
            writer.write_diff(&*guest.ram, pages)?;
            Ok(())
        },
    );
    guest.resume(); // also after an error
    let copy = copy?;
    writer.commit_and_release(copy.epoch)?;
    Ok(copy.state)
}

/// Saves a guest, and cancels the save of another file.
pub(crate) async fn demo() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let guest = Arc::new(Guest::start()?);

    let path = dir.path().join("full.mem");
    let (sender, mut receiver) = watch::channel(Progress::new(0, 0));
    let saving = tokio::spawn(save(Arc::clone(&guest), path.clone(), sender));
    // Other tasks run in the meantime. This one shows the progress.
    while receiver.changed().await.is_ok() {
        let now = *receiver.borrow_and_update();
        println!("{} of {} KiB", now.done >> 10, now.total >> 10);
    }
    let state = saving.await??;
    guest::check(&std::fs::read(&path)?, &state)?;
    println!("the image is of one moment");

    // `timeout` drops the future, which cancels the save.
    let other = dir.path().join("other.mem");
    let (sender, _receiver) = watch::channel(Progress::new(0, 0));
    let saving = save(Arc::clone(&guest), other.clone(), sender);
    match tokio::time::timeout(Duration::ZERO, saving).await {
        Ok(saved) => drop(saved?),
        Err(_) => println!("cancelled"),
    }
    Ok(())
}
