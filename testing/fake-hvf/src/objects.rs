//! Objects of the framework, which the caller holds by an opaque pointer and releases.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::calls::Code;

struct Objects {
    live: BTreeMap<usize, Box<dyn Any + Send>>,
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
pub(crate) fn create<T: Any + Send>(object: T) -> *mut c_void {
    let mut objects = objects();
    objects.next += 0x10;
    let handle = objects.next;
    objects.live.insert(handle, Box::new(object));
    std::ptr::without_provenance_mut(handle)
}

/// Calls `function` with an object. A pointer that stands for none of this type is a bad argument.
pub(crate) fn with<T: Any, R>(
    handle: *mut c_void,
    function: impl FnOnce(&mut T) -> R,
) -> Result<R, Code> {
    let mut objects = objects();
    let object = objects.live.get_mut(&handle.addr());
    let object = object.and_then(|object| object.downcast_mut());
    Ok(function(object.ok_or(Code::BAD_ARGUMENT)?))
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
