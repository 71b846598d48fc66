//! A device without data: it accepts the same step as another device and counts bytes by role, operations and launches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::*;
use crate::error::Result;

/// The device that a plan is for, which need not be present. Kernels take as much workspace as on this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The CPU.
    Cpu {
        /// Number of threads.
        threads: usize,
    },
    /// A GPU: the one in this machine, or else an H100.
    #[cfg(ett_cuda)]
    Cuda,
}

impl Target {
    /// The target for a device name as accepted by [`super::open`]. Fails for GPUs in a build without CUDA kernels,
    /// since only the kernels know the sizes of their workspaces.
    pub fn named(name: &str, threads: usize) -> Result<Self> {
        match Named::parse(name)? {
            Named::Cpu => Ok(Target::Cpu { threads: Cpu::new(threads)?.threads() }),
            #[cfg(ett_cuda)]
            Named::Cuda(_) => Ok(Target::Cuda),
            #[cfg(not(ett_cuda))]
            Named::Cuda(_) => Err(no_cuda()),
        }
    }

    /// The memory that the device holds permanently.
    fn held(self) -> Vec<(Role, usize)> {
        match self {
            Target::Cpu { .. } => vec![],
            #[cfg(ett_cuda)]
            Target::Cuda => cuda::held(true).into(),
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Cpu { threads: 1 } => f.write_str("the CPU with 1 thread"),
            Target::Cpu { threads } => write!(f, "the CPU with {threads} threads"),
            #[cfg(ett_cuda)]
            Target::Cuda => f.write_str("a GPU"),
        }
    }
}

/// Calls, operations and bytes of one kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelCount {
    /// Launches.
    pub calls: u64,
    /// Operations and minimal memory traffic of all launches.
    pub cost: Cost,
    /// The largest workspace of a launch, in bytes.
    pub workspace: u64,
}

/// What a rank sends to others by one collective.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Calls.
    pub calls: u64,
    /// Bytes that each rank sends in a ring, the least that any algorithm can do.
    pub bytes: u64,
}

#[derive(Default)]
struct State {
    memory: Memory,
    next: u64,
    largest: [u64; 7],
    kernels: BTreeMap<&'static str, KernelCount>,
    sent: BTreeMap<&'static str, Sent>,
}

struct Counter(Mutex<State>);

impl Counter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reclaim for Counter {
    unsafe fn reclaim(&self, _addr: u64, bytes: usize, role: Role) {
        self.lock().memory.sub(role, bytes);
    }
}

/// The planning device.
pub struct Plan {
    id: DeviceId,
    target: Target,
    ranks: usize,
    state: Arc<Counter>,
}

/// The first address. It is not null, since queries take null for an absent argument.
const FIRST: u64 = 256;

impl Plan {
    /// A plan for the CPU with one thread.
    pub fn new() -> Self {
        Self::of(Target::Cpu { threads: 1 })
    }

    /// A plan for `target`.
    pub fn of(target: Target) -> Self {
        Self::of_ranks(target, 1)
    }

    /// A plan for rank 0 of `ranks`, each of which has such a device.
    pub fn of_ranks(target: Target, ranks: usize) -> Self {
        let mut state = State { next: FIRST, ..State::default() };
        for (role, bytes) in target.held() {
            state.memory.add(role, bytes);
        }
        let ranks = ranks.max(1);
        Plan { id: DeviceId::unique(), target, ranks, state: Arc::new(Counter(Mutex::new(state))) }
    }

    /// The device that the plan is for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The counts so far, by kernel name.
    pub fn kernels(&self) -> BTreeMap<&'static str, KernelCount> {
        self.state.lock().kernels.clone()
    }

    /// What was sent to other ranks so far, by the name of the collective.
    pub fn sent(&self) -> BTreeMap<&'static str, Sent> {
        self.state.lock().sent.clone()
    }

    /// Resets the counts of kernels and collectives, but not of memory.
    pub fn reset_kernels(&self) {
        let mut state = self.state.lock();
        state.kernels.clear();
        state.sent.clear();
    }

    /// Counts a collective that sends `rounds` times a share of `whole` to each of the other ranks.
    fn send(&self, name: &'static str, rounds: u64, whole: &In) {
        let sent = &mut *self.state.lock();
        let sent = sent.sent.entry(name).or_default();
        let others = self.ranks as u64 - 1;
        sent.calls += 1;
        sent.bytes += rounds * (whole.bytes() / self.ranks as u64) * others;
    }

    /// Total operations of the kernels counted so far.
    pub fn flop(&self) -> u64 {
        self.state.lock().kernels.values().map(|k| k.cost.flop).sum()
    }

    /// The largest single buffer of each role, in the order of [`Role::ALL`].
    pub fn largest(&self) -> [u64; 7] {
        self.state.lock().largest
    }

    fn record(&self, a: &dyn Args, workspace: usize) {
        let mut s = self.state.lock();
        s.memory.add(Role::Workspace, workspace);
        s.memory.sub(Role::Workspace, workspace);
        let largest = &mut s.largest[Role::Workspace as usize];
        *largest = (*largest).max(workspace as u64);
        let cost = a.cost();
        let k = s.kernels.entry(a.kernel()).or_default();
        k.calls += 1;
        k.workspace = k.workspace.max(workspace as u64);
        k.cost.flop += cost.flop;
        k.cost.bytes += cost.bytes;
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self::new()
    }
}

impl Collectives for Plan {
    fn ranks(&self) -> usize {
        self.ranks
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, _s: Stream, x: Acc, _how: Reduction) -> Result<()> {
        check::view(self.id, "all_reduce", "x", &x.0)?;
        self.send("all_reduce", 2, &x.0);
        Ok(())
    }
    fn reduce_scatter(&self, _s: Stream, x: In, y: Out) -> Result<()> {
        check::parts(self.id, "reduce_scatter", ("y", &y.0), ("x", &x), 0, self.ranks)?;
        self.send("reduce_scatter", 1, &x);
        Ok(())
    }
    fn all_gather(&self, _s: Stream, x: In, y: Out) -> Result<()> {
        check::parts(self.id, "all_gather", ("x", &x), ("y", &y.0), 0, self.ranks)?;
        self.send("all_gather", 1, &y.0);
        Ok(())
    }
}

impl Device for Plan {
    fn name(&self) -> String {
        "plan".into()
    }

    fn id(&self) -> DeviceId {
        self.id
    }

    fn has_data(&self) -> bool {
        false
    }

    fn target(&self) -> Option<Target> {
        Some(self.target)
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        let mut s = self.state.lock();
        let all = s.memory.total().checked_add(bytes as u64);
        if all.is_none_or(|all| all > i64::MAX as u64) {
            return Err(Error::OutOfMemory {
                device: self.name(),
                role: role.to_string(),
                asked: size(bytes as u64),
                free: "more than any device has".into(),
                held: s.memory.largest(),
            });
        }
        s.memory.add(role, bytes);
        let largest = &mut s.largest[role as usize];
        *largest = (*largest).max(bytes as u64);
        let addr = s.next;
        s.next += bytes.next_multiple_of(256) as u64;
        drop(s);
        // SAFETY: a device without data.
        Ok(unsafe { Buffer::new(addr, bytes, role, self.id, self.state.clone()) })
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        check::view(self.id, "copy_in", "dst", &dst.0)?;
        if src.len() as u64 != dst.0.bytes() {
            return Err(Error::arg("copy_in", "src", src.len(), format!("{} bytes", dst.0.bytes())));
        }
        Ok(())
    }

    fn copy(&self, _s: Stream, src: In, dst: Out) -> Result<()> {
        check::copy(self.id, &src, &dst)
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        check::view(self.id, "read_later", "src", &src)?;
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
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => {
        impl Kernels for Plan {
            $(fn $name(&self, _s: Stream, a: &$args<'_>) -> Result<()> {
                check::call(self.id, a)?;
                let workspace = match self.target {
                    Target::Cpu { threads } => cpu::Query::workspace(a, threads),
                    #[cfg(ett_cuda)]
                    Target::Cuda => cuda::Query::workspace(a)?,
                };
                self.record(a, workspace);
                Ok(())
            })*
        }
    };
}
contract::kernel_table!(impl_plan);
