//! A save whose future is dropped leaves the old file, nothing beside it, and all marks.

use std::future::{Future, poll_fn};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use dirty_bitmap::{DirtyBitmap, Epoch};
use memory_writer::{CancelToken, MemoryWriter, SnapshotError};
use page_reader::PageReader;
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

const PAGE: u64 = 4096;
const RAM: u64 = 4 << 20;

/// RAM whose second half is read once the test permits it.
struct Gated {
    reached: Mutex<Option<oneshot::Sender<()>>>,
    permitted: Mutex<Receiver<()>>,
}

impl PageReader for Gated {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > RAM / 2
            && let Some(reached) = self.reached.lock().unwrap().take()
        {
            reached.send(()).unwrap();
            self.permitted.lock().unwrap().recv().unwrap();
        }
        buf.fill(7);
        Ok(())
    }
}

/// Saves RAM to `path`, as `docs/guides/async.md` does, and releases the marks.
async fn save(
    ram: Arc<Gated>,
    marks: Arc<DirtyBitmap>,
    path: PathBuf,
) -> Result<(), SnapshotError> {
    let token = CancelToken::new();
    let on_drop = token.clone().drop_guard();
    let saving = spawn_blocking(move || {
        let epoch = Epoch::begin(marks).expect("no other save");
        let options = MemoryWriter::options().cancel(token);
        let mut writer = options.open(&path, RAM, PAGE)?;
        writer.write_full(&*ram)?;
        writer.commit_and_release(epoch)
    });
    let saved = saving.await.expect("the save did not panic");
    let _ = on_drop.disarm();
    saved
}

/// Begins a save, and drops its future in the middle of the RAM unless `keep`. Waits until the save
/// has ended.
fn begin_save(path: &Path, marks: &Arc<DirtyBitmap>, keep: bool) {
    let (reached, in_the_middle) = oneshot::channel();
    let (permit, permitted) = mpsc::channel();
    let ram = Arc::new(Gated {
        reached: Mutex::new(Some(reached)),
        permitted: Mutex::new(permitted),
    });
    let runtime = Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut saving = Box::pin(save(ram, Arc::clone(marks), path.to_owned()));
        poll_fn(|context| {
            assert!(saving.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        in_the_middle.await.unwrap();
        if !keep {
            drop(saving);
            return permit.send(()).unwrap();
        }
        permit.send(()).unwrap();
        saving.await.unwrap();
    });
    // A runtime that is dropped waits for the blocking call.
    drop(runtime);
}

#[test]
fn dropped_save_leaves_the_old_file_and_all_marks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    std::fs::write(&path, b"old").unwrap();
    let marks = Arc::new(DirtyBitmap::new(0, RAM, PAGE).unwrap());
    marks.mark_range(0, 3 * PAGE).unwrap();

    begin_save(&path, &marks, false);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(marks.dirty_pages(), 3);

    // A save whose future is kept has the pages.
    begin_save(&path, &marks, true);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), RAM);
    assert!(marks.is_clean());
}
