//! The GPU as a device: memory, copies, ordering and errors. Its kernels are tested in `conformance`.

use ett::backend::{Add, DType, Fill, GatherFwd, Kernels, Role, Stream};
use ett::error::{Error, Result};
use ett::tensor::Tensor;

use crate::common::{Outcome, gpu, gpu_turn, int, normal, tensor};

const S: Stream = Stream::COMPUTE;

fn add(dev: &dyn Kernels, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = Tensor::empty(dev, Role::Activation, a.dtype(), a.dims())?;
    dev.add(S, &Add { a: a.view(), b: b.view(), y: y.out() })?;
    Ok(y)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn memory_comes_back_at_the_same_addresses() -> Outcome {
    let dev = gpu();
    let work = || -> Result<Vec<u64>> {
        let a = Tensor::zeros(&*dev, Role::Activation, DType::F32, [1000])?;
        let b = Tensor::zeros(&*dev, Role::Activation, DType::F32, [70_000])?;
        let c = add(&*dev, &a, &a)?;
        drop(a);
        let d = Tensor::zeros(&*dev, Role::Activation, DType::F32, [900])?;
        Ok([b, c, d].iter().map(|t| t.view().addr()).collect())
    };
    let before = dev.memory();
    let first = work()?;
    assert_eq!(dev.memory().live, before.live, "what was dropped is not counted");
    for _ in 0..3 {
        assert_eq!(work()?, first);
    }
    assert!(first.iter().all(|a| a % 256 == 0), "{first:?}");
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn too_much_memory_is_a_sentence() -> Outcome {
    let dev = gpu();
    let held = Tensor::zeros(&*dev, Role::Moment, DType::F32, [3 << 20])?;
    let e = dev.alloc(Role::Activation, 1 << 50).err().ok_or("a pebibyte")?;
    assert!(matches!(e, Error::OutOfMemory { .. }), "{e}");
    let text = e.to_string();
    println!("{text}");
    for part in ["1048576.0 GiB of activation memory requested", "are free", "moment 12.0 MiB", "--plan"] {
        assert!(text.contains(part), "{text}");
    }
    // The device remains usable.
    assert_eq!(held.range(0, 4)?.to_f64(&*dev)?, [0.0; 4]);
    Ok(())
}

/// Values survive a round trip for any size and stride, and a pending read returns the value even if it was
/// overwritten since.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn copies_and_pending_reads() -> Outcome {
    let dev = gpu();
    for n in [1, 7, 4096, 3_000_001, 20_000_003] {
        let v = normal(n as u64, n.min(1000)).into_iter().cycle().take(n).collect::<Vec<_>>();
        let v: Vec<f32> = v.into_iter().map(|x| x as f32).collect();
        let t = Tensor::from_host(&*dev, Role::Input, &v, [n])?;
        assert!(t.to_host::<f32>(&*dev)? == v, "{n} values");
    }
    let m = tensor(&*dev, DType::Bf16, &(0..60).map(f64::from).collect::<Vec<_>>(), [6, 10]);
    let slice = m.columns(3, 4)?;
    let want: Vec<f64> = (0..6).flat_map(|r| (3..7).map(move |c| f64::from(10 * r + c))).collect();
    assert_eq!(slice.to_f64(&*dev)?, want);
    let x = tensor(&*dev, DType::F32, &[1.0; 8], [8]);
    let pending = dev.read_later(S, x.view())?;
    dev.fill(S, &Fill { y: x.out(), value: 2.0 })?;
    let later = dev.read_later(S, x.view())?;
    drop(dev.read_later(S, x.view())?);
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&pending.wait()?), [1.0; 8]);
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&later.wait()?), [2.0; 8]);
    Ok(())
}

/// Batches are copied on the other stream and used after an `order`, and their memory is reused at once.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn copies_on_the_other_stream_are_ordered() -> Outcome {
    let dev = gpu();
    let n = 4 << 20;
    let mut sums = Vec::new();
    for i in 0..20 {
        let batch = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
        let v = vec![i as f32; n];
        dev.copy_in(Stream::COPY, bytemuck::cast_slice(&v), batch.out())?;
        dev.order(Stream::COPY, Stream::COMPUTE)?;
        let mut y = add(&*dev, &batch, &batch)?;
        for _ in 0..4 {
            y = add(&*dev, &y, &batch)?;
        }
        sums.push(y);
    }
    for (i, y) in sums.iter().enumerate() {
        let v = y.to_host::<f32>(&*dev)?;
        assert!(v.iter().all(|&x| x == 6.0 * i as f32), "batch {i}");
    }
    Ok(())
}

/// A batch may be dropped while its copy is in progress. Once, its memory was given to the next batch after waiting
/// for the compute stream only: the copy then overwrote what a kernel had written there, so that the next batch had
/// values of the dropped one.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn memory_of_a_copy_under_way_is_not_reused_before_its_end() -> Outcome {
    let dev = gpu();
    // A single piece of pinned memory: enqueued at once, and far slower to copy than to fill.
    let n = 8 << 20;
    let old = vec![1f32; n];
    let load = Tensor::zeros(&*dev, Role::Activation, DType::F32, [64 << 20])?;
    for i in 0..10 {
        let batch = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
        let at = batch.view().addr();
        // The copy starts together with the next work of the compute stream.
        for _ in 0..10 {
            dev.fill(S, &Fill { y: load.out(), value: 0.0 })?;
        }
        dev.order(Stream::COMPUTE, Stream::COPY)?;
        dev.copy_in(Stream::COPY, bytemuck::cast_slice(&old), batch.out())?;
        drop(batch);
        let next = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
        assert_eq!(next.view().addr(), at, "the block is used again");
        dev.fill(S, &Fill { y: next.out(), value: 2.0 })?;
        dev.synchronize()?;
        let wrong = next.to_host::<f32>(&*dev)?.iter().filter(|v| **v != 2.0).count();
        assert_eq!(wrong, 0, "round {i}: the copy of a dropped batch overwrote {wrong} of {n} values");
    }
    Ok(())
}

/// The same with a recording, which takes the block from the device while it is being copied to. Once, the replay
/// waited for the compute stream only.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn a_recording_does_not_reuse_memory_of_a_copy_under_way_either() -> Outcome {
    let dev = gpu();
    let n = 8 << 20;
    let old = vec![1f32; n];
    let batch = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
    let at = batch.view().addr();
    dev.copy_in(Stream::COPY, bytemuck::cast_slice(&old), batch.out())?;
    drop(batch);
    let mut y = None;
    let recording = dev
        .record(&mut || {
            let t = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
            dev.fill(S, &Fill { y: t.out(), value: 2.0 })?;
            y = Some(t);
            Ok(())
        })?
        .ok_or("a GPU records")?;
    let y = y.ok_or("the work ran once")?;
    assert_eq!(y.view().addr(), at, "the device's free block is used");
    recording.replay()?;
    dev.synchronize()?;
    assert!(y.to_host::<f32>(&*dev)?.iter().all(|v| *v == 2.0));
    Ok(())
}

/// A batch of the device is dropped during a recording. Once, the event recorded then belonged to the recording, so
/// that ordering the next batch in the same memory was an error of the driver.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn a_batch_may_be_dropped_within_a_recording() -> Outcome {
    let dev = gpu();
    let n = 1 << 20;
    let x = tensor(&*dev, DType::F32, &[1.0; 64], [64]);
    let mut batch = Some(Tensor::from_host(&*dev, Role::Input, &vec![1f32; n], [n])?);
    let mut y = None;
    let recording = dev
        .record(&mut || {
            batch = None;
            y = Some(add(&*dev, &x, &x)?);
            Ok(())
        })?
        .ok_or("a GPU records")?;
    let next = Tensor::empty(&*dev, Role::Input, DType::F32, [n])?;
    dev.copy_in(Stream::COPY, bytemuck::cast_slice(&vec![3f32; n]), next.out())?;
    dev.order(Stream::COPY, Stream::COMPUTE)?;
    recording.replay()?;
    assert!(next.to_host::<f32>(&*dev)?.iter().all(|v| *v == 3.0));
    assert_eq!(y.ok_or("the work ran once")?.to_f64(&*dev)?, [2.0; 64]);
    Ok(())
}

/// A recording that needs memory which the device holds free. Once, the recording did not look there and ran out of
/// memory. If it had a free block of its own, it waited for the whole device, which CUDA forbids during a recording
/// (the recording was lost), and returned that block to the driver although its launches still wrote there. The test
/// takes most of the memory, so it runs in a process of its own.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn a_recording_can_use_what_the_device_holds_free() -> Outcome {
    const CHILD: &str = "ETT_TEST_RECORD_CHILD";
    gpu_turn();
    if std::env::var_os(CHILD).is_none() {
        let out = std::process::Command::new(std::env::current_exe()?)
            .args([
                "--include-ignored",
                "--exact",
                "--nocapture",
                "gpu::a_recording_can_use_what_the_device_holds_free",
            ])
            .env(CHILD, "1")
            .output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.contains("1 passed"), "{said}");
        return Ok(());
    }
    let dev = ett::backend::open("cuda", 0)?;
    let x = tensor(&*dev, DType::F32, &[1.0; 64], [64]);
    let free = dev.available().ok_or("a GPU knows")? as usize;
    let most = free / 10 * 7;
    // One part: as large as the device's free block. Two parts: other sizes, for which that block has to be returned
    // to the driver.
    for parts in [1, 2] {
        let held = dev.alloc(Role::Activation, most)?;
        let at = held.addr();
        drop(held);
        let (mut y, mut large, mut once_at) = (None, Vec::new(), 0);
        let recording = dev
            .record(&mut || {
                let once = add(&*dev, &x, &x)?;
                once_at = once.view().addr();
                y = Some(add(&*dev, &once, &x)?);
                // A free block that belongs to the recording.
                drop(once);
                for _ in 0..parts {
                    large.push(dev.alloc(Role::Activation, most / parts - (parts - 1) * (16 << 20))?);
                }
                Ok(())
            })?
            .ok_or("a GPU records")?;
        assert!(parts > 1 || large[0].addr() == at, "the device's own block is used");
        let y = y.ok_or("the work ran once")?;
        for value in [3.0, 5.0] {
            dev.fill(S, &Fill { y: x.out(), value })?;
            // The recording does not write to memory allocated since, not even in the middle of its launches.
            let others: Vec<Tensor> = (0..8)
                .map(|_| Tensor::zeros(&*dev, Role::Activation, DType::F32, [64]))
                .collect::<Result<_>>()?;
            assert!(others.iter().all(|t| t.view().addr() != once_at));
            recording.replay()?;
            assert_eq!(y.to_f64(&*dev)?, [3.0 * value; 64]);
            for t in &others {
                assert_eq!(t.to_f64(&*dev)?, [0.0; 64]);
            }
        }
        // Dropping the recording returns its memory.
        drop((recording, large, y));
        drop(dev.alloc(Role::Activation, most)?);
    }
    // Asking for too much memory is an error during a recording too, and the device remains usable.
    let e = dev.record(&mut || dev.alloc(Role::Activation, 1 << 50).map(drop)).err().ok_or("a pebibyte")?;
    assert!(matches!(e, Error::OutOfMemory { .. }), "{e}");
    dev.fill(S, &Fill { y: x.out(), value: 1.0 })?;
    assert_eq!(add(&*dev, &x, &x)?.to_f64(&*dev)?, [2.0; 64]);
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn wrong_indices_are_reported_once() -> Outcome {
    let dev = gpu();
    let table = tensor(&*dev, DType::F32, &normal(1, 40), [10, 4]);
    let y = Tensor::empty(&*dev, Role::Activation, DType::F32, [3, 4])?;
    let idx = int(&*dev, &[2, 10, -1]);
    dev.gather_fwd(S, &GatherFwd { table: table.view(), idx: idx.view(), y: y.out() })?;
    let e = y.to_f64(&*dev).expect_err("row 10 of 10").to_string();
    assert_eq!(e, "gather_fwd: argument `idx` is 10 at element 1, wanted below 10");
    let v = y.to_f64(&*dev)?;
    assert_eq!(&v[4..], [0.0; 8], "wrong and negative indices give zeros");
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn recordings_refuse_what_they_cannot_hold() -> Outcome {
    let dev = gpu();
    let x = tensor(&*dev, DType::F32, &[1.0; 64], [64]);
    let mut y = None;
    let recording = dev
        .record(&mut || {
            let once = add(&*dev, &x, &x)?;
            y = Some(add(&*dev, &once, &x)?);
            for e in [
                dev.copy_in(S, &[0; 256], x.out()).err(),
                dev.read_later(S, x.view()).err(),
                dev.record(&mut || Ok(())).err(),
                dev.order(Stream::COMPUTE, Stream::COPY).err(),
                dev.order(Stream::COPY, S).err(),
                dev.synchronize().err(),
            ] {
                let e = e.map(|e| e.to_string()).unwrap_or_default();
                assert!(e.contains("recording"), "{e}");
            }
            Ok(())
        })?
        .ok_or("a GPU records")?;
    let y = y.ok_or("the work ran once")?;
    for value in [3.0, 5.0] {
        dev.fill(S, &Fill { y: x.out(), value })?;
        // The recording does not write to memory allocated since.
        let other = Tensor::zeros(&*dev, Role::Activation, DType::F32, [64])?;
        recording.replay()?;
        assert_eq!(y.to_f64(&*dev)?, [3.0 * value; 64]);
        assert_eq!(other.to_f64(&*dev)?, [0.0; 64]);
    }
    // An error during a recording leaves the device usable.
    let wrong = tensor(&*dev, DType::F32, &[1.0; 63], [63]);
    assert!(dev.record(&mut || add(&*dev, &x, &wrong).map(|_| ())).is_err());
    assert_eq!(add(&*dev, &x, &x)?.to_f64(&*dev)?, [10.0; 64]);
    Ok(())
}

#[cfg(ett_cuda)]
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn forced_kernels_are_used_or_refused() -> Outcome {
    use ett::backend::cuda::{Cuda, Options};
    gpu_turn();
    let with = |force: &str| Cuda::with(0, &Options { force: force.into(), ..Options::default() });
    let dev = with("add=plain")?;
    let x = tensor(&dev, DType::F32, &[1.0; 64], [64]);
    assert_eq!(add(&dev, &x, &x)?.to_f64(&dev)?, [2.0; 64]);
    let dev = with("add=fast")?;
    let x = tensor(&dev, DType::F32, &[1.0; 64], [64]);
    let e = add(&dev, &x, &x).expect_err("no such kernel").to_string();
    assert!(e.contains("ETT_FORCE") && e.contains("add=fast") && e.ends_with("one of wide, plain"), "{e}");
    assert!(with("nothing=plain").is_err());
    let e = Cuda::new(99).err().ok_or("no 100 GPUs")?.to_string();
    assert!(e.starts_with("cuda:99: there is no such GPU"), "{e}");
    Ok(())
}

/// An invalid address, for a kernel that has to fail.
#[cfg(ett_cuda)]
struct Nowhere;
#[cfg(ett_cuda)]
impl ett::backend::Reclaim for Nowhere {
    unsafe fn reclaim(&self, _addr: u64, _bytes: usize, _role: Role) {}
}

/// With `ETT_SYNC=1`, the error of a GPU names the kernel that caused it. The test leaves the GPU unusable for its
/// process, so it runs in a process of its own.
#[cfg(ett_cuda)]
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn sync_blames_the_kernel() -> Outcome {
    use ett::backend::cuda::{Cuda, Options};
    use ett::backend::{Buffer, Device, In};
    const CHILD: &str = "ETT_TEST_SYNC_CHILD";
    gpu_turn();
    if std::env::var_os(CHILD).is_none() {
        let out = std::process::Command::new(std::env::current_exe()?)
            .args(["--include-ignored", "--exact", "--nocapture", "gpu::sync_blames_the_kernel"])
            .envs([(CHILD, "1"), ("ETT_SYNC", "1")])
            .output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.contains("blamed: "), "{said}");
        return Ok(());
    }
    let dev = Cuda::with(0, &Options::from_env())?;
    let x = tensor(&dev, DType::F32, &[1.0; 64], [64]);
    // An address far from any allocation.
    // SAFETY: the host does not access it. The access stops the GPU, which is what the test is about, and the process
    // does not use the GPU afterwards.
    let wild = unsafe { Buffer::new(1 << 45, 256, Role::Activation, dev.id(), std::sync::Arc::new(Nowhere)) };
    let a = In::new(&wild, 0, DType::F32, [64], 64)?;
    add(&dev, &x, &x)?;
    let y = Tensor::empty(&dev, Role::Activation, DType::F32, [64])?;
    let e = dev.add(S, &Add { a, b: x.view(), y: y.out() }).expect_err("no memory is there").to_string();
    assert!(e.contains("add (") && e.contains("failed"), "{e}");
    println!("blamed: {e}");
    // The GPU can no longer free its memory in order.
    std::process::exit(0)
}

/// Times and gaps of launches. While they are measured, nothing is recorded.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn a_profile_counts_every_launch_and_the_time_between_them() -> Outcome {
    let dev = gpu();
    assert!(dev.profile()?.is_none());
    let small = tensor(&*dev, DType::F32, &[1.0; 64], [64]);
    dev.start_profile()?;
    // More launches than wait at once.
    let (n, rounds) = (16 << 20, 6000);
    let large = Tensor::zeros(&*dev, Role::Activation, DType::F32, [n])?;
    for _ in 0..rounds {
        add(&*dev, &small, &small)?;
    }
    dev.synchronize()?;
    let pause = std::time::Duration::from_millis(50);
    std::thread::sleep(pause);
    add(&*dev, &large, &large)?;
    let p = dev.profile()?.ok_or("it was started")?;
    let kernels = p.kernels();
    for k in &kernels {
        println!("{k:?}");
    }
    let of = |name: &str| kernels.iter().filter(|k| k.kernel == name).collect::<Vec<_>>();
    let adds = of("add");
    assert_eq!(adds.iter().map(|k| k.calls).sum::<u64>(), rounds + 1);
    assert!(adds.iter().all(|k| !k.implementation.is_empty() && k.seconds > 0.0), "{adds:?}");
    let (idle, seconds) = (p.idle(), p.busy());
    assert!(idle >= pause.as_secs_f64() && idle < 2.0, "{idle} s without a kernel");
    // A large sum takes at least as long as its memory at 20 TB/s.
    assert!(seconds > 12.0 * n as f64 / 20e12 && seconds < 2.0, "{seconds} s in kernels");
    let bytes = 12.0 * n as f64 + rounds as f64 * 12.0 * 64.0;
    assert_eq!(adds.iter().map(|k| k.bytes).sum::<f64>(), bytes);
    assert!(dev.profile()?.is_some_and(|p| p.kernels().is_empty()), "it starts again");
    assert!(dev.record(&mut || Err(Error::device("cuda", "is not to be recorded")))?.is_none());
    Ok(())
}

/// A model of 3 GB in bf16 is on the device in at most 1.5 times what reading its file takes.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn weights_arrive_nearly_as_fast_as_their_file_is_read() -> Outcome {
    use std::io::Read;
    use std::time::Instant;

    use ett::formats::{Archive, Encoding, FileTensor, Selection, write_safetensors};
    use ett::io::weights::{Fit, load_selection};

    let dev = gpu();
    let cfg = ett::config::LlmConfig::default();
    let mut b = ett::nn::ParamBuilder::new();
    ett::model::Llm::new(&mut b, &cfg);
    let prec = ett::backend::Precision::parse("bf16").ok_or("a precision")?;
    let params = b.build_without(dev.clone(), prec, 1, &|_| true)?;
    let dir = crate::common::Scratch::new();
    let path = dir.path("model.safetensors");
    let tensors = params.names().map(|(name, _, dims)| {
        let bytes = 2 * dims.iter().product::<usize>();
        let (name, dims) = (name.to_string(), dims.to_vec());
        FileTensor { name, dims, encoding: Encoding::Bf16, bytes: Box::new(move || Ok(vec![0x3c; bytes])) }
    });
    let tensors = tensors.collect();
    ett::files::replace(&path, |f| write_safetensors(f, tensors, Default::default()))?;
    let bytes = std::fs::metadata(&path)?.len() as f64;

    let read = || -> std::io::Result<f64> {
        let (start, mut piece) = (Instant::now(), vec![0; 16 << 20]);
        let mut file = std::fs::File::open(&path)?;
        while file.read(&mut piece)? > 0 {}
        Ok(start.elapsed().as_secs_f64())
    };
    let load = || -> Result<f64> {
        let start = Instant::now();
        load_selection(&params, &Selection::whole(Archive::open(&path)?), Fit::EXACT)?;
        dev.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first times fill the page cache and the pool of pinned memory.
    let (mut reading, mut loading) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        reading.push(read()?);
        loading.push(load()?);
    }
    println!("{:.2} GB: reading {reading:.3?} s, loading {loading:.3?} s", bytes / 1e9);
    let least = |all: &[f64]| all.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(least(&loading) <= 1.5 * least(&reading));
    let want = f64::from(half::bf16::from_le_bytes([0x3c, 0x3c]));
    let t = params.read("model.norm.weight", ett::nn::Stored::Master)?.ok_or("a weight")?;
    assert!(t.values.iter().all(|&v| v == want));
    Ok(())
}
