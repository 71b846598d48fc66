//! Sums of gradients over ranks, span by span while the backward pass goes on.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::Params;
use super::share::Span;
use crate::autograd::WeightId;
use crate::backend::{Accumulate, DType, Kernels, Reduction, Role, Stream};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The spans of a group to whose gradients a backward pass is adding: each is there from its first use until it is summed
/// over the ranks.
pub(super) struct Spans {
    elements: Vec<Range<usize>>,
    live: Mutex<Vec<Option<Tensor>>>,
}

impl Spans {
    pub fn of(spans: &[Span]) -> Self {
        let elements: Vec<_> = spans.iter().map(|s| s.elements.clone()).collect();
        Spans { live: Mutex::new(vec![None; elements.len()]), elements }
    }

    /// The span with this number, which starts with zeros.
    fn span(&self, dev: &dyn Kernels, dtype: DType, i: usize) -> Result<Tensor> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = &live[i] {
            return Ok(there.clone());
        }
        let new = Tensor::zeros(dev, Role::Gradient, dtype, [self.elements[i].len()])?;
        live[i] = Some(new.clone());
        Ok(new)
    }

    /// The `n` elements from element `at` of the group on, which are in one span.
    pub fn tensor(&self, dev: &dyn Kernels, dtype: DType, at: usize, n: usize) -> Result<Tensor> {
        let Some(i) = self.elements.iter().position(|e| e.contains(&at)) else {
            return Err(Error::arg("gradient", "at", at, "an element of the group"));
        };
        self.span(dev, dtype, i)?.range(at - self.elements[i].start, n)
    }

    /// The same span without leaving it here.
    fn take(&self, dev: &dyn Kernels, dtype: DType, i: usize) -> Result<Tensor> {
        let span = self.span(dev, dtype, i)?;
        self.live.lock().unwrap_or_else(PoisonError::into_inner)[i] = None;
        Ok(span)
    }
}

/// A span whose parameters are not all done.
struct Open {
    group: usize,
    span: usize,
    /// Parameters to whose gradients something may still be added.
    left: usize,
}

/// A span that is being summed, until the compute stream has waited for it.
#[derive(Default)]
struct Summing {
    /// Memory that the sum reads.
    _span: Option<Tensor>,
    /// What has to be added to the sums of the parts of the batch before.
    add: Vec<(Tensor, Tensor)>,
}

/// Sums the gradients of a backward pass over all ranks, on the stream for collectives. All ranks sum the same spans in the
/// same order: a span waits for those before it.
pub struct Reducer<'a> {
    params: &'a Params,
    open: Vec<Open>,
    places: HashMap<WeightId, usize>,
    /// The spans before this one are done.
    next: usize,
    summing: Summing,
    /// Whether these are the first gradients since they were zero.
    first: bool,
}

impl<'a> Reducer<'a> {
    /// For the gradients of `groups`, in the order in which a backward pass is done with them, of part `part` of a batch of
    /// `parts`. Does nothing with a single rank.
    pub fn new(params: &'a Params, groups: &[&str], part: usize, parts: usize) -> Self {
        let (mut open, mut places) = (Vec::new(), HashMap::new());
        // Sums of whole gradients are those of all parts; where they are kept by parts of ranks, those of each.
        let now = params.sharing.gradients || part + 1 == parts;
        let groups = groups.iter().filter(|_| params.sharing.ranks > 1 && now);
        for group in groups.filter_map(|name| params.group(name)) {
            let g = &params.groups[group];
            let spans = g.layout.spans.iter().enumerate().filter(|_| g.train.is_some()).rev();
            for (span, Span { items, .. }) in spans {
                places.extend(items.clone().map(|item| ((group, item), open.len())));
                open.push(Open { group, span, left: items.len() });
            }
        }
        Reducer { params, open, places, next: 0, summing: Summing::default(), first: part == 0 }
    }

    /// Nothing more will be added to the gradient of this parameter.
    pub fn done(&mut self, id: WeightId) -> Result<()> {
        if let Some(&i) = self.places.get(&id) {
            let open = &mut self.open[i];
            open.left = open.left.saturating_sub(1);
        }
        while self.open.get(self.next).is_some_and(|open| open.left == 0) {
            self.sum_next()?;
        }
        Ok(())
    }

    /// Sums what is left; afterwards the compute stream has the sums.
    pub fn finish(mut self) -> Result<()> {
        while self.next < self.open.len() {
            self.sum_next()?;
        }
        self.wait()
    }

    /// Makes the compute stream wait for the sums so far.
    fn wait(&mut self) -> Result<()> {
        if self.next == 0 {
            return Ok(());
        }
        let dev = &*self.params.dev;
        dev.order(Stream::PEERS, Stream::COMPUTE)?;
        for (new, sum) in std::mem::take(&mut self.summing).add {
            dev.accumulate(Stream::COMPUTE, &Accumulate { x: new.view(), y: sum.acc() })?;
        }
        Ok(())
    }

    fn sum_next(&mut self) -> Result<()> {
        let Open { group, span, .. } = self.open[self.next];
        let (params, s) = (self.params, &self.params.sharing);
        let g = &params.groups[group];
        let Some(t) = &g.train else { return Ok(()) };
        let (dev, layout) = (&*params.dev, &g.layout.spans[span]);
        let peers = dev.collectives();
        let mut summing = Summing::default();
        if let Some(spans) = &t.spans {
            // Whoever uses the memory of the span before next runs after its sum.
            self.wait()?;
            let whole = spans.take(dev, t.grad.dtype(), span)?;
            let mut parts = Vec::new();
            for piece in layout.pieces(s) {
                let own = s.stored(&piece);
                let sum = t.grad.range(own.start, own.len())?;
                let to = match self.first {
                    true => sum.clone(),
                    false => Tensor::empty(dev, Role::Gradient, sum.dtype(), sum.dims())?,
                };
                parts.push((piece, sum, to));
            }
            dev.order(Stream::COMPUTE, Stream::PEERS)?;
            for (piece, sum, to) in parts {
                let from = whole.range(piece.start - layout.elements.start, piece.len())?;
                peers.reduce_scatter(Stream::PEERS, from.view(), to.out())?;
                if !self.first {
                    summing.add.push((to, sum));
                }
            }
            summing._span = Some(whole);
        } else {
            dev.order(Stream::COMPUTE, Stream::PEERS)?;
            for piece in layout.pieces(s) {
                let whole = t.grad.range(piece.start, piece.len())?;
                if s.state {
                    let part = s.part(&piece);
                    let part = t.grad.range(part.start, part.len())?;
                    peers.reduce_scatter(Stream::PEERS, whole.view(), part.out())?;
                } else {
                    peers.all_reduce(Stream::PEERS, whole.acc(), Reduction::Sum)?;
                }
            }
        }
        self.summing = summing;
        self.next += 1;
        Ok(())
    }
}
