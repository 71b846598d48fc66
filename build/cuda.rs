//! Compiles CUDA files to one object each, as many at once as cargo allows. Objects are cached under a hash of
//! everything that they depend on, since file times mean nothing in a fresh checkout.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use std::{env, fs, thread};

use super::Result;

/// An object that no build has used for this long is deleted.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// A CUDA compiler and its library.
pub struct Toolkit {
    nvcc: PathBuf,
    /// The versions that nvcc and its host compiler print.
    version: String,
    /// The folder of libcudart_static.a.
    pub lib: PathBuf,
}

impl Toolkit {
    /// The toolkit that the environment names, or the first one found. If there is none, and `root`, the file system's
    /// root, has a driver or the environment says so, `tools/setup-cuda` fetches one. `None` if CUDA is off or there is
    /// no compiler.
    pub fn find(root: &Path) -> Result<Option<Toolkit>> {
        let mode = variable("ETT_CUDA").unwrap_or_default();
        if mode == "off" {
            return Ok(None);
        }
        if !["", "require", "fetch"].contains(&&*mode) {
            return Err(format!("ETT_CUDA is `{mode}`, wanted `fetch`, `require`, `off` or nothing"));
        }
        // Build scripts run in the folder of the package.
        let package = env::current_dir().map_err(|e| e.to_string())?;
        if let Some(nvcc) = locate(&package)? {
            return Toolkit::at(nvcc).map(Some);
        }
        let mut none =
            "there is no CUDA compiler in NVCC, CUDA_HOME, .cuda, PATH, /usr/local/cuda or /opt/cuda"
                .to_string();
        if mode == "fetch" || has_driver(root) {
            match host().and_then(|_| fetch(&package)).and_then(Toolkit::at) {
                Ok(toolkit) => return Ok(Some(toolkit)),
                Err(why) => none += &format!(", and none can be fetched ({})", one_line(&why)),
            }
        }
        match &*mode {
            "" => {
                let hint = "tools/setup-cuda fetches one, ETT_CUDA=off hides this";
                println!("cargo::warning={none}: built for the CPU only ({hint})");
                Ok(None)
            }
            _ => Err(format!("{none}, but ETT_CUDA={mode} needs one: tools/setup-cuda fetches it")),
        }
    }

    fn at(nvcc: PathBuf) -> Result<Toolkit> {
        println!("cargo::rerun-if-changed={}", nvcc.display());
        let version = said(Command::new(&nvcc).arg("--version"))? + &host()?;
        // The folder above bin: as named, and with links resolved.
        let real = fs::canonicalize(&nvcc).unwrap_or_else(|_| nvcc.clone());
        let homes = [&nvcc, &real].map(|p| p.parent().and_then(Path::parent).map(Path::to_path_buf));
        for home in homes.into_iter().flatten() {
            for lib in ["lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"] {
                if home.join(lib).join("libcudart_static.a").exists() {
                    return Ok(Toolkit { nvcc, version, lib: home.join(lib) });
                }
            }
        }
        Err(format!(
            "{} has no libcudart_static.a near it: this CUDA installation is incomplete",
            nvcc.display()
        ))
    }
}

/// The version of the host compiler that nvcc uses.
fn host() -> Result<String> {
    said(Command::new(variable("NVCC_CCBIN").unwrap_or_else(|| "g++".into())).arg("--version"))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The value of an environment variable; cargo reruns this script when it changes. Empty counts as unset.
fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|v| !v.is_empty())
}

/// Whether there is an NVIDIA driver below `root`, the file system's root: for a GPU of the machine, of a container or
/// of Windows around Linux.
pub fn has_driver(root: &Path) -> bool {
    ["proc/driver/nvidia/version", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1"]
        .iter()
        .any(|p| root.join(p).exists())
}

/// The compiler inside of the folder of the package, where `tools/setup-cuda` puts it.
const FETCHED: &str = ".cuda/nvidia/cu13/bin/nvcc";

/// Fetches a compiler with `tools/setup-cuda`. The error is its reason, one line.
pub fn fetch(package: &Path) -> Result<PathBuf> {
    let setup = package.join("tools/setup-cuda");
    said(Command::new("sh").arg(setup).arg("--from-build")).map_err(|e| {
        let reason = e.lines().rev().find_map(|l| l.strip_prefix("setup-cuda: ")).unwrap_or(&e);
        one_line(reason).trim_end_matches('.').to_string()
    })?;
    let nvcc = package.join(FETCHED);
    // Cargo runs this script again if a file that it names is newer than the start of the script.
    let file = fs::File::options().append(true).open(&nvcc);
    let old = fs::metadata(package.join("build.rs")).and_then(|m| m.modified());
    let aged = file.and_then(|file| file.set_modified(old?));
    aged.map_err(|e| format!("{} cannot be used: {e}", nvcc.display()))?;
    Ok(nvcc)
}

fn locate(package: &Path) -> Result<Option<PathBuf>> {
    let named = variable("NVCC").map(PathBuf::from);
    let mut folders: Vec<PathBuf> =
        variable("CUDA_HOME").map(|home| Path::new(&home).join("bin")).into_iter().collect();
    folders.extend(package.join(FETCHED).parent().map(Path::to_path_buf));
    let path: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    if let Some(nvcc) = named {
        // A name without a folder is searched for in PATH, as a shell does.
        let mut places = if nvcc.components().count() > 1 { vec![PathBuf::new()] } else { path };
        places.retain(|p| p.join(&nvcc).is_file());
        let first = places.first().map(|p| Some(p.join(&nvcc)));
        return first.ok_or_else(|| format!("NVCC is `{}`, wanted an existing file", nvcc.display()));
    }
    folders.extend(path);
    folders.extend(["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from));
    Ok(folders.into_iter().map(|f| f.join("nvcc")).find(|nvcc| nvcc.is_file()))
}

/// The output of a command that must succeed.
fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| format!("`{name}` cannot be run: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    if out.status.success() { Ok(text.into()) } else { Err(format!("{text}\n`{name}` failed")) }
}

/// The compute capabilities to compile for, separated by spaces.
pub fn targets() -> String {
    variable("ETT_CUDA_ARCHS").unwrap_or_else(|| "80 90a".into())
}

/// Compiles `sources`, which are paths inside `kernels`, and returns the objects in the same order. Compiler warnings,
/// and kernels that spill registers or need a stack, are errors.
pub fn compile(toolkit: &Toolkit, kernels: &Path, sources: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut flags = makefile_flags(kernels)?;
    flags.extend(targets().split_whitespace().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
    flags.push("-gencode=arch=compute_80,code=compute_80".into());
    flags.extend(["-Xptxas".into(), "-v".into()]);
    let mut common = DefaultHasher::new();
    (&flags, &toolkit.version, variable("NVCC_PREPEND_FLAGS"), variable("NVCC_APPEND_FLAGS"))
        .hash(&mut common);

    // One cache for all profiles: OUT_DIR is <target>/<profile>/build/<package>/out.
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let cache = out.ancestors().nth(4).unwrap_or(&out).join("ett-kernels-cache");
    fs::create_dir_all(&cache).map_err(|e| format!("{} cannot be made: {e}", cache.display()))?;

    let mut objects = Vec::new();
    let mut missing = Vec::new();
    for source in sources {
        let mut hash = common.clone();
        let read =
            |p: &Path| fs::read_to_string(p).map_err(|e| format!("{} cannot be read: {e}", p.display()));
        for file in with_headers(source, &[&kernels.join("include"), &kernels.join("common")]) {
            (file.strip_prefix(kernels).unwrap_or(&file), read(&file)?).hash(&mut hash);
        }
        let name = source.strip_prefix(kernels).unwrap_or(source).with_extension("");
        let name = name.display().to_string().replace('/', "-");
        let object = cache.join(format!("{name}-{:016x}.o", hash.finish()));
        if object.exists() {
            // Mark it as used today.
            let file = fs::File::options().append(true).open(&object);
            let _ = file.and_then(|f| f.set_modified(SystemTime::now()));
        } else {
            missing.push((source.as_path(), object.clone()));
        }
        objects.push(object);
    }

    // The largest first, so that the last one to start is quick.
    missing.sort_by_key(|(source, _)| std::cmp::Reverse(fs::metadata(source).map_or(0, |m| m.len())));
    let cores = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).max(1);
    let workers = cores.min(missing.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut errors = String::new();
        while let Some((source, object)) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Spare cores compile for several architectures at once.
            if let Err(e) = compile_one(toolkit, &flags, cores / workers, kernels, source, object) {
                errors += &e;
            }
        }
        errors
    };
    let errors: String = thread::scope(|s| {
        let threads: Vec<_> = (0..workers).map(|_| s.spawn(work)).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| "a compiler thread panicked\n".into()))
            .collect()
    });
    if !errors.is_empty() {
        return Err(format!(
            "{errors}\nCUDA files do not compile without errors and warnings: stderr has the compiler's output"
        ));
    }
    write_list(&cache, kernels, sources, &objects)?;
    forget(&cache);
    Ok(objects)
}

/// The compiler flags, from the Makefile, without the architectures. nvcc runs in the Makefile's folder.
fn makefile_flags(kernels: &Path) -> Result<Vec<String>> {
    let makefile =
        fs::read_to_string(kernels.join("Makefile")).map_err(|e| format!("kernels/Makefile: {e}"))?;
    let line = makefile.lines().find_map(|l| l.strip_prefix("NVCC_FLAGS := "));
    let flags =
        line.and_then(|l| l.strip_suffix(" $(GENCODE)")).filter(|f| !f.contains(['$', '\\', '"', '\'']));
    let wanted = "kernels/Makefile: wanted a line `NVCC_FLAGS := <plain words> $(GENCODE)`";
    Ok(flags.ok_or(wanted)?.split_whitespace().map(String::from).collect())
}

/// A file and everything that it includes, directly or indirectly, from `folders` or from the folder of the including
/// file. Includes that are not found there belong to CUDA or the system.
pub fn with_headers(source: &Path, folders: &[&Path]) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let mut open = vec![source.to_path_buf()];
    while let Some(file) = open.pop() {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for line in text.lines() {
            let Some(directive) = line.trim_start().strip_prefix('#') else { continue };
            let Some(name) = directive.trim_start().strip_prefix("include") else { continue };
            let name = name.trim_start().trim_start_matches(['"', '<']);
            let name = name.split(['"', '>']).next().unwrap_or_default();
            let beside = file.parent().into_iter();
            open.extend(beside.chain(folders.iter().copied()).map(|f| f.join(name)).find(|p| p.is_file()));
        }
        all.insert(file);
        open.retain(|f| !all.contains(f));
    }
    all
}

fn compile_one(
    toolkit: &Toolkit,
    flags: &[String],
    threads: usize,
    kernels: &Path,
    source: &Path,
    object: &Path,
) -> Result<()> {
    let within = source.strip_prefix(kernels).unwrap_or(source).display();
    let unfinished = object.with_extension(format!("{}.o", std::process::id()));
    let mut nvcc = Command::new(&toolkit.nvcc);
    nvcc.current_dir(kernels).args(flags).arg(format!("--threads={threads}"));
    nvcc.arg("-c").arg(within.to_string()).arg("-o").arg(&unfinished);
    let result = said(&mut nvcc).and_then(|log| {
        let complaints = complaints(&log);
        if !complaints.is_empty() {
            return Err(complaints);
        }
        let done =
            fs::write(object.with_extension("log"), &log).and_then(|()| fs::rename(&unfinished, object));
        done.map_err(|e| format!("{}: {e}", object.display()))
    });
    if result.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    result.map_err(|e| format!("kernels/{within}:\n{}\n", e.trim_end()))
}

/// The problems of an object, from nvcc's output with `-Xptxas -v`: warnings of all its parts, performance advice
/// (C75xx), and kernels that spill registers or need a stack. Empty if there are none.
pub fn complaints(log: &str) -> String {
    let mut wrong = Vec::new();
    let mut function = "";
    for line in log.lines().filter(|l| !l.trim().is_empty()) {
        let info = line.starts_with("ptxas info");
        if let Some((_, name)) = line.split_once("Compiling entry function ") {
            function = name; // includes the architecture
        } else if line.contains(" bytes stack frame, ") {
            if line.trim() != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" {
                wrong.extend([function, line]);
            }
        } else if !info || line.contains("(C75") {
            wrong.push(line);
        }
    }
    wrong.join("\n")
}

/// Lists the objects of the last build, for tools/kernel-code.
fn write_list(cache: &Path, kernels: &Path, sources: &[PathBuf], objects: &[PathBuf]) -> Result<()> {
    let mut list = format!("{}\n", kernels.display());
    for (source, object) in sources.iter().zip(objects) {
        let object = object.file_name().unwrap_or_default().to_string_lossy();
        list += &format!("{}\t{object}\n", source.strip_prefix(kernels).unwrap_or(source).display());
    }
    let file = cache.join("last-build.tsv");
    fs::write(&file, list).map_err(|e| format!("{} cannot be written: {e}", file.display()))
}

/// Deletes objects that have not been used for a long time, with their logs.
fn forget(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let path = entry.path();
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if path.extension().is_some_and(|e| e == "o") && age.is_some_and(|a| a > KEEP) {
            let _ = fs::remove_file(path.with_extension("log"));
            let _ = fs::remove_file(&path);
        }
    }
}
