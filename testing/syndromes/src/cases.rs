//! The accesses that are recorded.

use serde::{Deserialize, Serialize};

/// A page that stage 2 maps in one way. Each is restored before each case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Page {
    /// Data that the guest may read and execute. The tracker protects pages so.
    ProtectedData,
    /// Data that is not mapped.
    UnmappedData,
    /// Data that the guest may read and write.
    NoExecuteData,
    /// Data without a limit.
    WritableData,
    /// A table of stage 1 without a limit.
    WritableTable,
    /// A table of stage 1 that the guest may read and execute.
    ProtectedTable,
    /// A table of stage 1 that is not mapped.
    UnmappedTable,
}

impl Page {
    pub(crate) const ALL: [Self; 7] = [
        Self::ProtectedData,
        Self::UnmappedData,
        Self::NoExecuteData,
        Self::WritableData,
        Self::WritableTable,
        Self::ProtectedTable,
        Self::UnmappedTable,
    ];

    pub(crate) fn is_table(self) -> bool {
        match self {
            Self::ProtectedData | Self::UnmappedData | Self::NoExecuteData | Self::WritableData => {
                false
            }
            Self::WritableTable | Self::ProtectedTable | Self::UnmappedTable => true,
        }
    }
}

/// An entry of the tables of stage 1. All entries map the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Entry {
    /// Accessed and writable.
    Accessed,
    /// Writable. The processor sets the access flag.
    NotAccessed,
    /// Accessed and writable-clean. The processor sets the dirty state at a write.
    Clean,
    /// Both are missing.
    NotAccessedClean,
}

impl Entry {
    pub(crate) const ALL: [Self; 4] = [
        Self::Accessed,
        Self::NotAccessed,
        Self::Clean,
        Self::NotAccessedClean,
    ];
}

/// A walk of the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Walk {
    pub table: Page,
    pub entry: Entry,
}

/// An instruction with an address in x0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub instruction: String,
    /// The page at the address.
    pub page: Page,
    /// The tables that translate the address. `None` stands for tables that need no update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub walk: Option<Walk>,
}

/// A branch to the page, where an instruction ends the case.
pub(crate) const FETCH: &str = "br x0";

/// Accesses to a page. x1 to x3 have the value in memory, x4 and x5 others.
const ACCESSES: [&str; 34] = [
    "strb w4, [x0]",
    "str x4, [x0]",
    "str x4, [x0], #8",
    "str x4, [x0, #-4]", // also writes the end of the page before
    "stp x4, x5, [x0]",
    "stnp x4, x5, [x0]",
    "str q0, [x0]",
    "stp q0, q1, [x0]",
    "st1 {v0.16b}, [x0]",
    "st4 {v0.2d, v1.2d, v2.2d, v3.2d}, [x0]",
    "stlr x4, [x0]",
    "1: ldxr x6, [x0]; stxr w7, x4, [x0]; cbnz w7, 1b",
    "1: ldaxp x6, x7, [x0]; stlxp w8, x4, x5, [x0]; cbnz w8, 1b",
    "cas x1, x4, [x0]",
    "casal w1, w4, [x0]",
    "casp x2, x3, x4, x5, [x0]",
    "cas x4, x5, [x0]", // does not store
    "ldadd x4, x6, [x0]",
    "ldadd xzr, x6, [x0]", // stores the same value
    "stset x4, [x0]",
    "swp x4, x6, [x0]",
    "dc zva, x0",
    "dc ivac, x0",
    "dc cvac, x0",
    "dc civac, x0",
    "ic ivau, x0",
    "at s1e1r, x0",
    "at s1e1w, x0",
    "prfm pstl1keep, [x0]",
    "ldr x6, [x0]",
    "ldp x6, x7, [x0]",
    "ldr q0, [x0]",
    "ldxr x6, [x0]",
    FETCH,
];

/// Accesses for which the processor walks the guest's tables.
const WALKS: [&str; 9] = [
    "ldr x6, [x0]",
    "str x4, [x0]",
    "stp x4, x5, [x0]",
    "ldadd x4, x6, [x0]",
    "dc zva, x0",
    "dc civac, x0",
    "at s1e1r, x0",
    "at s1e1w, x0",
    FETCH,
];

/// Returns all cases.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for page in [Page::ProtectedData, Page::UnmappedData] {
        cases.extend(ACCESSES.map(|instruction| case(instruction, page, None)));
    }
    cases.push(case(FETCH, Page::NoExecuteData, None));
    let tables = [
        Page::WritableTable,
        Page::ProtectedTable,
        Page::UnmappedTable,
    ];
    for table in tables {
        for entry in Entry::ALL {
            let walk = Some(Walk { table, entry });
            cases.extend(WALKS.map(|instruction| case(instruction, Page::WritableData, walk)));
        }
    }
    let walk = Walk {
        table: Page::ProtectedTable,
        entry: Entry::NotAccessedClean,
    };
    for instruction in ["ldr x6, [x0]", "str x4, [x0]", "stp x4, x5, [x0]"] {
        cases.push(case(instruction, Page::ProtectedData, Some(walk)));
    }
    cases
}

fn case(instruction: &str, page: Page, walk: Option<Walk>) -> Case {
    Case {
        instruction: instruction.into(),
        page,
        walk,
    }
}
