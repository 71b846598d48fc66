//! Matrix products with cuBLASLt. The algorithm for a shape is the first result of the library's heuristic, which is
//! called once per shape. Algorithms are never chosen by timing, so that runs are reproducible.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t as Desc;

use super::ffi;
use crate::backend::DType;

/// Bytes of workspace for algorithms, as recommended by NVIDIA for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// Largest alignment of addresses and rows that algorithms can use, in bytes; smaller ones are passed to the heuristic.
const ALIGNMENT: u32 = 16;

/// All parameters that the choice of an algorithm depends on, in column-major terms: `d[m, n] = op(a)[m, k] op(b)[k,
/// n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: u64,
    n: u64,
    k: u64,
    ta: bool,
    tb: bool,
    act: i32,
    out: i32,
    bias: bool,
    end: End,
    ld: [i64; 4],
    alignment: [u32; 4],
}

/// The epilogue: how the sums are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum End {
    Store,
    Add,
    Gelu,
}

/// Arguments of `y = op(a) op(b) + bias` and its variants.
pub(super) struct Product<'a> {
    pub(super) a: &'a ffi::ett_view,
    pub(super) b: &'a ffi::ett_view,
    pub(super) ta: bool,
    pub(super) tb: bool,
    /// May be absent.
    pub(super) bias: Option<&'a ffi::ett_view>,
    pub(super) y: &'a ffi::ett_view,
    /// If present, receives the sums, and `y` their GELU.
    pub(super) pre: Option<&'a ffi::ett_view>,
    /// Adds to `y`, which is f32.
    pub(super) add: bool,
}

/// A shape's descriptors and algorithm.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

/// A cuBLASLt handle and the plans made so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// Contains `None` for shapes that the library does not support.
    plans: Mutex<HashMap<Shape, Option<Plan>>>,
}

// SAFETY: the handle may be used from any thread, as cuBLASLt documents; plans own their descriptors.
unsafe impl Send for Products {}
// SAFETY: likewise; plans are used under the lock.
unsafe impl Sync for Products {}

fn rows(v: &ffi::ett_view) -> i64 {
    v.dims[..v.rank.max(1) as usize - 1].iter().product()
}

fn cols(v: &ffi::ett_view) -> i64 {
    if v.rank == 0 { 1 } else { v.dims[v.rank as usize - 1] }
}

fn stride(v: &ffi::ett_view) -> i64 {
    if rows(v) > 1 { v.ld } else { cols(v) }
}

impl Product<'_> {
    /// Whether the arguments satisfy the contract and have types and alignments that are passed to the library.
    fn fits(&self) -> bool {
        let (f32, bf16) = (DType::F32 as i32, DType::Bf16 as i32);
        let (a, b, y) = (self.a, self.b, self.y);
        let (n, ka) = if self.ta { (cols(a), rows(a)) } else { (rows(a), cols(a)) };
        let (kb, o) = if self.tb { (cols(b), rows(b)) } else { (rows(b), cols(b)) };
        (a.dtype == f32 || a.dtype == bf16)
            && b.dtype == a.dtype
            && y.dtype == if self.add { f32 } else { a.dtype }
            && (ka, n, o) == (kb, rows(y), cols(y))
            && self.bias.is_none_or(|v| {
                v.dtype == a.dtype && rows(v) * cols(v) == o && stride(v) == cols(v) && (v.ptr as u64).is_multiple_of(16)
            })
            // The library requires `pre` and its rows to be aligned to 16 bytes.
            && self.pre.is_none_or(|v| {
                v.dtype == a.dtype && (rows(v), cols(v)) == (n, o) && alignment(v) == ALIGNMENT && stride(v) % 8 == 0
            })
    }
}

/// The largest power of two, at most [`ALIGNMENT`], that divides address and row stride.
fn alignment(v: &ffi::ett_view) -> u32 {
    let size = if v.dtype == DType::Bf16 as i32 { 2 } else { 4 };
    let together = v.ptr as u64 | (stride(v) * size) as u64;
    1 << together.trailing_zeros().min(ALIGNMENT.trailing_zeros())
}

fn data_type(dtype: i32) -> sys::cudaDataType {
    match dtype == DType::Bf16 as i32 {
        true => sys::cudaDataType_t::CUDA_R_16BF,
        false => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Products {
    /// Opens the library; the error says, after its name, why that cannot be done.
    pub(super) fn new() -> std::result::Result<Self, String> {
        // SAFETY: it only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err("was not found".into());
        }
        let handle = lt::create_handle().map_err(|e| format!("does not start ({e})"))?;
        Ok(Products { handle, plans: Mutex::default() })
    }

    /// Enqueues a product. Returns `false` and does nothing if the arguments are invalid or empty, which the launcher
    /// handles, or if the library does not support them.
    pub(super) fn run(
        &self,
        p: &Product,
        workspace: u64,
        stream: *mut c_void,
    ) -> std::result::Result<bool, CublasError> {
        let absent = ffi::ett_view::default();
        let pre = p.pre.unwrap_or(&absent);
        // Row-major y = a b is column-major y' = b' a', so the operands are swapped.
        let shape = Shape {
            m: cols(p.y) as u64,
            n: rows(p.y) as u64,
            k: if p.ta { rows(p.a) } else { cols(p.a) } as u64,
            ta: p.tb,
            tb: p.ta,
            act: p.a.dtype,
            out: p.y.dtype,
            bias: p.bias.is_some(),
            end: match (p.add, p.pre) {
                (true, _) => End::Add,
                (_, Some(_)) => End::Gelu,
                _ => End::Store,
            },
            ld: [p.b, p.a, p.y, pre].map(stride),
            alignment: [p.b, p.a, p.y, pre].map(alignment),
        };
        if shape.m == 0 || shape.n == 0 || shape.k == 0 || !p.fits() {
            return Ok(false);
        }
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => e.insert(self.plan(&shape, p)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let (one, beta) = (1f32, if p.add { 1f32 } else { 0f32 });
        let at = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // SAFETY: `launch` checked that the views lie inside their buffers, and the shape was computed from them; the
        // descriptors live as long as the plan, the attributes have the types that the library documents, and the
        // workspace has the given size.
        unsafe {
            if let Some(bias) = p.bias {
                set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.ptr)?;
            }
            if p.pre.is_some() {
                set(plan.desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &pre.ptr)?;
            }
            let done = lt::matmul(
                self.handle,
                plan.desc,
                at(&one),
                at(&beta),
                p.b.ptr,
                plan.a,
                p.a.ptr,
                plan.b,
                p.y.ptr,
                plan.d,
                p.y.ptr,
                plan.d,
                &plan.algo,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            );
            match done {
                // A reason that the heuristic does not check, such as the alignment of a bias.
                Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(false),
                done => done.map(|()| true),
            }
        }
    }

    fn plan(&self, s: &Shape, p: &Product) -> std::result::Result<Option<Plan>, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        // f32 operands use full single precision, never TF32.
        let desc = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        // cublasOperation_t: 0 is not transposed, 1 is transposed.
        let op = |t: bool| t as i32;
        let layout = |ty: i32, rows: u64, cols: u64, ld: i64, t: bool| {
            let (rows, cols) = if t { (cols, rows) } else { (rows, cols) };
            lt::create_matrix_layout(data_type(ty), rows, cols, ld.max(rows as i64))
        };
        let a = layout(s.act, s.m, s.k, s.ld[0], s.ta)?;
        let b = layout(s.act, s.k, s.n, s.ld[1], s.tb)?;
        let d = layout(s.out, s.m, s.n, s.ld[2], false)?;
        let pref = lt::create_matmul_pref()?;
        // SAFETY: the descriptors were just made, and the attributes have the types that the library documents.
        let found = unsafe {
            set(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, &op(s.ta))?;
            set(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, &op(s.tb))?;
            let epilogue = match (s.end, s.bias) {
                (End::Gelu, false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX,
                (End::Gelu, true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                (_, false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
                (_, true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            };
            set(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            // The heuristic may read these; every call sets the pointers again.
            if let Some(bias) = p.bias {
                set(desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.ptr)?;
            }
            if let Some(pre) = p.pre {
                set(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &s.ld[3])?;
                set(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &pre.ptr)?;
            }
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &s.alignment[0])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &s.alignment[1])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &s.alignment[2])?;
            prefer(pref, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &s.alignment[2])?;
            let found = lt::get_matmul_algo_heuristic(self.handle, desc, a, b, d, d, pref);
            lt::destroy_matmul_pref(pref)?;
            found
        };
        match found {
            Ok(h) => Ok(Some(Plan { desc, a, b, d, algo: h.algo })),
            Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
                | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
            )) => {
                // SAFETY: created above, and not part of a plan.
                unsafe { destroy(desc, [a, b, d]) };
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// # Safety
/// `desc` is a valid descriptor, and the attribute is a `T`.
unsafe fn set<T>(
    desc: sys::cublasLtMatmulDesc_t,
    what: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    // SAFETY: guaranteed by the caller.
    unsafe { lt::set_matmul_desc_attribute(desc, what, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// # Safety
/// `pref` is a valid preference, and the attribute is a `T`.
unsafe fn prefer<T>(
    pref: sys::cublasLtMatmulPreference_t,
    what: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    // SAFETY: guaranteed by the caller.
    unsafe { lt::set_matmul_pref_attribute(pref, what, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// # Safety
/// All are valid and not used again.
unsafe fn destroy(desc: sys::cublasLtMatmulDesc_t, layouts: [sys::cublasLtMatrixLayout_t; 3]) {
    // SAFETY: guaranteed by the caller; destroying a valid descriptor does not fail.
    unsafe {
        let _ = lt::destroy_matmul_desc(desc);
        for l in layouts {
            let _ = lt::destroy_matrix_layout(l);
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        for plan in self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).values().flatten() {
            // SAFETY: a plan owns its descriptors, and the plans are dropped here.
            unsafe { destroy(plan.desc, [plan.a, plan.b, plan.d]) };
        }
        // SAFETY: `new` created the handle, and nothing uses it after this.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}
