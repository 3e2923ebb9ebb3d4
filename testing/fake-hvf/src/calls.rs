//! How each function of the framework is called: it is counted, it may be made to fail, and its
//! result becomes a code.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::RangeInclusive;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::systems;

/// An error code of the framework (`Hypervisor/hv_error.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Code(pub i32);

impl Code {
    pub const ERROR: Self = Self::numbered(1);
    pub const BUSY: Self = Self::numbered(2);
    pub const BAD_ARGUMENT: Self = Self::numbered(3);
    pub const ILLEGAL_GUEST_STATE: Self = Self::numbered(4);
    pub const NO_RESOURCES: Self = Self::numbered(5);
    pub const NO_DEVICE: Self = Self::numbered(6);
    pub const DENIED: Self = Self::numbered(7);
    pub const FAULT: Self = Self::numbered(8);
    pub const UNSUPPORTED: Self = Self::numbered(15);

    const fn numbered(number: u32) -> Self {
        Self((0xfae9_4000 | number).cast_signed())
    }
}

/// The result of a function of the framework.
pub(crate) type Outcome = Result<(), Code>;

/// Defines functions of the framework. The body of each returns an [`Outcome`].
macro_rules! framework {
    ($(
        $(#[$attribute:meta])*
        fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block
    )*) => {$(
        $(#[$attribute])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> i32 {
            $crate::calls::answer(
                stringify!($name),
                #[allow(clippy::redundant_closure_call, reason = "for the question mark")]
                || -> $crate::calls::Outcome { $body },
            )
        }
    )*};
}
pub(crate) use framework;

/// A failure to inject.
struct Failure {
    name: String,
    /// The numbers of the calls that fail, counted from 1.
    numbers: RangeInclusive<u64>,
    code: Code,
}

struct Calls {
    counts: BTreeMap<&'static str, u64>,
    failures: Vec<Failure>,
}

static CALLS: Mutex<Calls> = Mutex::new(Calls {
    counts: BTreeMap::new(),
    failures: Vec::new(),
});

fn calls() -> MutexGuard<'static, Calls> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the call, and fails if it is one that is to fail.
fn begin(name: &'static str) -> Outcome {
    systems::assert_has(name);
    let mut calls = calls();
    let count = calls.counts.entry(name).or_default();
    *count += 1;
    let number = *count;
    let injected = |failure: &&Failure| failure.name == name && failure.numbers.contains(&number);
    match calls.failures.iter().find(injected) {
        Some(failure) => Err(failure.code),
        None => Ok(()),
    }
}

/// Makes the calls `first` to `last` of a function fail, counted from now on.
pub(crate) fn fail(name: &str, first: u64, last: u64, code: Code) {
    let mut calls = calls();
    let made = calls.counts.get(name).copied().unwrap_or_default();
    calls.failures.push(Failure {
        name: name.to_owned(),
        numbers: made + first..=made.saturating_add(last),
        code,
    });
}

/// Forgets all calls and failures.
pub(crate) fn clear() {
    let mut calls = calls();
    calls.counts.clear();
    calls.failures.clear();
}

/// Returns how often each function was called.
pub(crate) fn counts() -> BTreeMap<&'static str, u64> {
    calls().counts.clone()
}

/// Calls a function that returns a code.
pub(crate) fn answer(name: &'static str, function: impl FnOnce() -> Outcome) -> i32 {
    match begin(name).and_then(|()| function()) {
        Ok(()) => 0,
        Err(Code(code)) => code,
    }
}

/// Calls a function that returns an object, or null.
pub(crate) fn answer_object(
    name: &'static str,
    function: impl FnOnce() -> Option<*mut c_void>,
) -> *mut c_void {
    let object = begin(name).ok().and_then(|()| function());
    object.unwrap_or(ptr::null_mut())
}

/// Writes a result to the address that the caller passed. Null is a bad argument.
pub(crate) fn give<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(Code::BAD_ARGUMENT);
    }
    // SAFETY: the caller passes the address of a variable of this type, by the header.
    unsafe { to.write(value) };
    Ok(())
}
