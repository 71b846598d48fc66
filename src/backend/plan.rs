//! A device without data: it runs the same step and counts bytes by role, operations and launches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::*;
use crate::error::Result;

/// Calls, operations and bytes of one kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelCount {
    /// Launches.
    pub calls: u64,
    /// Operations and least bytes over all launches.
    pub cost: Cost,
}

#[derive(Default)]
struct State {
    memory: Memory,
    next: u64,
    largest: [u64; 7],
    kernels: BTreeMap<&'static str, KernelCount>,
}

struct Counter(Mutex<State>);

impl Counter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reclaim for Counter {
    fn reclaim(&self, _addr: u64, bytes: usize, role: Role) {
        self.lock().memory.sub(role, bytes);
    }
}

/// The planning device.
pub struct Plan {
    state: Arc<Counter>,
}

impl Plan {
    /// A plan that has counted nothing yet.
    pub fn new() -> Self {
        Plan { state: Arc::new(Counter(Mutex::new(State::default()))) }
    }

    /// What ran so far, by kernel name.
    pub fn kernels(&self) -> BTreeMap<&'static str, KernelCount> {
        self.state.lock().kernels.clone()
    }

    /// Forgets the kernels counted so far; memory stays.
    pub fn reset_kernels(&self) {
        self.state.lock().kernels.clear();
    }

    /// Operations of everything that ran so far.
    pub fn flop(&self) -> u64 {
        self.state.lock().kernels.values().map(|k| k.cost.flop).sum()
    }

    /// The largest single buffer of each role, in the order of [`Role::ALL`].
    pub fn largest(&self) -> [u64; 7] {
        self.state.lock().largest
    }

    fn record(&self, a: &dyn Args) -> Result<()> {
        for (name, _, v) in a.views() {
            check_view(a.kernel(), name, &v)?;
        }
        let mut s = self.state.lock();
        let cost = a.cost();
        let k = s.kernels.entry(a.kernel()).or_default();
        k.calls += 1;
        k.cost.flop += cost.flop;
        k.cost.bytes += cost.bytes;
        Ok(())
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self::new()
    }
}

impl Collectives for Plan {
    fn ranks(&self) -> usize {
        1
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, _s: Stream, x: Acc) -> Result<()> {
        check_view("all_reduce", "x", &x.0)
    }
    fn reduce_scatter(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Ok(())
    }
    fn all_gather(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Ok(())
    }
}

impl Device for Plan {
    fn name(&self) -> String {
        "plan".into()
    }

    fn has_data(&self) -> bool {
        false
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        let mut s = self.state.lock();
        s.memory.add(role, bytes);
        let largest = &mut s.largest[role as usize];
        *largest = (*largest).max(bytes as u64);
        s.next += bytes.next_multiple_of(256) as u64;
        let addr = s.next;
        drop(s);
        Ok(Buffer::new(addr, bytes, role, self.state.clone()))
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        check_view("copy_in", "dst", &dst.0)?;
        if src.len() as u64 != dst.0.bytes() {
            return Err(Error::arg("copy_in", "src", src.len(), format!("{} bytes", dst.0.bytes())));
        }
        Ok(())
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        let n = src.bytes() as usize;
        Ok(Pending::new(move || Ok(vec![0; n])))
    }

    fn collectives(&self) -> &dyn Collectives {
        self
    }

    fn memory(&self) -> Memory {
        self.state.lock().memory.clone()
    }
}

macro_rules! impl_plan {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty,)*
    })*) => {
        impl Kernels for Plan {
            $(fn $name(&self, _s: Stream, a: &$args<'_>) -> Result<()> {
                self.record(a)
            })*
        }
    };
}
contract::kernel_table!(impl_plan);
