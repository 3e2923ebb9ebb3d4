//! Objects of the framework, which the caller holds by an opaque pointer and releases.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::calls::Code;

/// An object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    VmConfig(crate::vm::Config),
    VcpuConfig,
    GicConfig(crate::gic::Config),
    GicState(Vec<u8>),
}

struct Objects {
    live: BTreeMap<usize, Object>,
    next: usize,
}

static OBJECTS: Mutex<Objects> = Mutex::new(Objects {
    live: BTreeMap::new(),
    next: 0x1000,
});

fn objects() -> MutexGuard<'static, Objects> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a pointer that stands for a new object. It points at nothing.
pub(crate) fn create(object: Object) -> *mut c_void {
    let mut objects = objects();
    objects.next += 0x10;
    let handle = objects.next;
    objects.live.insert(handle, object);
    std::ptr::without_provenance_mut(handle)
}

/// Calls `function` with an object. A pointer that stands for none is a bad argument.
pub(crate) fn with<T>(
    handle: *mut c_void,
    function: impl FnOnce(&mut Object) -> Result<T, Code>,
) -> Result<T, Code> {
    let mut objects = objects();
    let object = objects.live.get_mut(&handle.addr());
    function(object.ok_or(Code::BAD_ARGUMENT)?)
}

/// Ends an object. Returns whether it existed.
pub(crate) fn release(handle: *mut c_void) -> bool {
    objects().live.remove(&handle.addr()).is_some()
}

/// Returns the number of objects that were not released.
pub(crate) fn count() -> usize {
    objects().live.len()
}

/// Ends all objects.
pub(crate) fn clear() {
    objects().live.clear();
}
