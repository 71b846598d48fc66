//! What is kept per parameter where ranks share it.

use std::ops::Range;

use super::params::{Params, Store};
use super::share::Sharing;
use crate::backend::{Cast, DType, Kernels, Role, Stream};
use crate::error::Result;
use crate::tensor::Tensor;

/// What of a group a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// All of it.
    Whole,
    /// This rank's own parts of all pieces, one after another.
    Parts,
    /// As much as all of it, but only this rank's own parts are valid.
    Places,
}

/// A tensor kept per parameter of a group.
#[derive(Clone)]
pub(super) struct Kept {
    pub tensor: Tensor,
    /// It has only this rank's own parts of all pieces.
    pub parts: bool,
}

impl Kept {
    /// New memory for a group of `len` elements, or for the own parts of `sharing`.
    pub fn empty(
        dev: &dyn Kernels,
        role: Role,
        dtype: DType,
        len: usize,
        sharing: Option<&Sharing>,
    ) -> Result<Self> {
        let n = len / sharing.map_or(1, |s| s.ranks);
        Ok(Kept { tensor: Tensor::empty(dev, role, dtype, [n])?, parts: sharing.is_some() })
    }

    pub fn form(&self) -> Form {
        if self.parts { Form::Parts } else { Form::Whole }
    }
}

impl Sharing {
    /// What a rank has of the gradients after they were summed.
    pub(super) fn form_of_gradients(&self) -> Form {
        match (self.state, self.gradients) {
            (_, true) => Form::Parts,
            (true, false) => Form::Places,
            (false, false) => Form::Whole,
        }
    }

    /// Where a tensor in this form has the own part of a piece.
    fn own(&self, form: Form, piece: &Range<usize>) -> Range<usize> {
        match form {
            Form::Parts => self.stored(piece),
            Form::Whole | Form::Places => self.part(piece),
        }
    }
}

/// Where a rank keeps some values of a group: which of them, counted from the first, and the tensors for them.
pub(super) type Places = Vec<(Range<usize>, Tensor)>;

/// What a rank updates at a time.
pub struct Slice {
    /// Master weights.
    pub master: Tensor,
    /// Their gradients.
    pub grad: Tensor,
    /// First moments.
    pub m: Tensor,
    /// Second moments.
    pub v: Tensor,
    /// Averages of the weights.
    pub ema: Option<Tensor>,
    /// The copy that products read.
    pub shadow: Option<Tensor>,
    /// What all other ranks have to get afterwards, and where: this rank's part, and the whole.
    pub gathers: Vec<(Tensor, Tensor)>,
}

fn at(t: &Tensor, r: Range<usize>) -> Result<Tensor> {
    t.range(r.start, r.len())
}

impl Store {
    /// The pieces of the group, in order.
    pub(super) fn pieces(&self, sharing: &Sharing) -> Vec<Range<usize>> {
        self.layout.spans.iter().flat_map(|span| span.pieces(sharing)).collect()
    }
}

impl Params {
    /// How ranks share what is kept per parameter.
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The gradients of a group that this rank adds to a norm: together, those of all ranks are all of them.
    pub fn own_gradients(&self, group: usize) -> Result<Vec<Tensor>> {
        let (g, s) = (&self.groups[group], &self.sharing);
        let Some(t) = &g.train else { return Ok(vec![]) };
        if s.ranks == 1 {
            return Ok(vec![t.grad.clone()]);
        }
        let form = s.form_of_gradients();
        g.pieces(s).iter().map(|piece| at(&t.grad, s.own(form, piece))).collect()
    }

    /// What an optimizer of this rank updates of a group, in order; nothing if the group is frozen.
    pub fn slices(&self, group: usize) -> Result<Vec<Slice>> {
        let (g, s) = (&self.groups[group], &self.sharing);
        let Some(t) = &g.train else { return Ok(vec![]) };
        if !s.state {
            return Ok(vec![Slice {
                master: g.master.tensor.clone(),
                grad: t.grad.clone(),
                m: t.m.clone(),
                v: t.v.clone(),
                ema: g.ema.as_ref().map(|ema| ema.tensor.clone()),
                shadow: g.shadow.clone(),
                gathers: vec![],
            }]);
        }
        let slice = |piece: &Range<usize>| -> Result<Slice> {
            let own = |t: &Tensor, form| at(t, s.own(form, piece));
            let master = own(&g.master.tensor, g.master.form())?;
            let shadow = g.shadow.as_ref().map(|shadow| own(shadow, Form::Whole)).transpose()?;
            let mut gathers = Vec::new();
            if let (Some(whole), Some(part)) = (&g.shadow, &shadow) {
                gathers.push((part.clone(), at(whole, piece.clone())?));
            }
            if !g.master.parts {
                gathers.push((master.clone(), at(&g.master.tensor, piece.clone())?));
            }
            Ok(Slice {
                master,
                grad: own(&t.grad, s.form_of_gradients())?,
                m: own(&t.m, Form::Parts)?,
                v: own(&t.v, Form::Parts)?,
                ema: g.ema.as_ref().map(|ema| own(&ema.tensor, ema.form())).transpose()?,
                shadow,
                gathers,
            })
        };
        g.pieces(s).iter().map(slice).collect()
    }

    /// Starts averages of these groups from the current weights; existing averages are kept.
    pub fn average(&mut self, groups: &[&str]) -> Result<()> {
        let (acc, s) = (self.precision().acc, self.sharing);
        for i in 0..self.groups.len() {
            if !self.is_one_of(i, groups) || self.groups[i].ema.is_some() {
                continue;
            }
            let g = &self.groups[i];
            let parts = s.state.then_some(&s);
            let ema = Kept::empty(&*self.dev, Role::Ema, acc, g.layout.len, parts)?;
            for (from, to) in self.pairs(g, &g.master, &ema)? {
                self.cast(&from, &to)?;
            }
            self.groups[i].ema = Some(ema);
        }
        Ok(())
    }

    fn cast(&self, from: &Tensor, to: &Tensor) -> Result<()> {
        self.dev.cast(Stream::COMPUTE, &Cast { x: from.view(), y: to.out() })
    }

    /// The values that this rank has in both of two tensors of a group.
    fn pairs(&self, g: &Store, a: &Kept, b: &Kept) -> Result<Vec<(Tensor, Tensor)>> {
        if a.parts == b.parts {
            return Ok(vec![(a.tensor.clone(), b.tensor.clone())]);
        }
        let own = |t: &Kept, piece| at(&t.tensor, self.sharing.own(t.form(), piece));
        g.pieces(&self.sharing).iter().map(|piece| Ok((own(a, piece)?, own(b, piece)?))).collect()
    }

    /// Gives all ranks the own parts that each has in a whole tensor of a group.
    fn spread(&self, g: &Store, whole: &Tensor) -> Result<()> {
        let peers = self.dev.collectives();
        for piece in g.pieces(&self.sharing) {
            let part = at(whole, self.sharing.part(&piece))?;
            peers.all_gather(Stream::COMPUTE, part.view(), at(whole, piece)?.out())?;
        }
        Ok(())
    }

    /// Rounds the master weights into the copies that products read. Where ranks share master weights, all of them call this
    /// at the same point.
    pub fn refresh(&self) -> Result<()> {
        for g in &self.groups {
            let Some(shadow) = &g.shadow else { continue };
            let to = Kept { tensor: shadow.clone(), parts: false };
            for (from, to) in self.pairs(g, &g.master, &to)? {
                self.cast(&from, &to)?;
            }
            if g.master.parts {
                self.spread(g, shadow)?;
            }
        }
        Ok(())
    }

    /// Swaps weights and averages of every group that has averages, for an evaluation; call again to undo. Where ranks share
    /// averages, all of them call this at the same point.
    pub fn swap_averages(&mut self) -> Result<()> {
        for i in 0..self.groups.len() {
            let g = &mut self.groups[i];
            let Some(ema) = &mut g.ema else { continue };
            if g.master.parts == ema.parts {
                std::mem::swap(&mut g.master, ema);
                continue;
            }
            let g = &self.groups[i];
            let Some(ema) = &g.ema else { continue };
            for (master, ema) in self.pairs(g, &g.master, ema)? {
                let kept = Tensor::empty(&*self.dev, Role::Activation, master.dtype(), master.dims())?;
                self.cast(&master, &kept)?;
                self.cast(&ema, &master)?;
                self.cast(&kept, &ema)?;
            }
            self.spread(g, &g.master.tensor)?;
        }
        self.refresh()
    }

    /// Ends the sharing: afterwards rank 0 has all weights and averages, and needs no other rank. All ranks call this at the same
    /// point, when nothing is being trained; the parameters of the others are of no use any more.
    pub fn unshare(&mut self) -> Result<()> {
        for i in 0..self.groups.len() {
            let g = &self.groups[i];
            let whole = |kept: &Kept, role| -> Result<Kept> {
                if !kept.parts {
                    return Ok(kept.clone());
                }
                if self.sharing.rank > 0 {
                    self.gathered(g, &kept.tensor, Form::Parts, &(0..g.layout.len))
                        .try_for_each(|p| p.map(drop))?;
                    return Ok(kept.clone());
                }
                let to = Kept::empty(&*self.dev, role, self.precision().acc, g.layout.len, None)?;
                let mut end = 0;
                for piece in self.gathered(g, &kept.tensor, Form::Parts, &(0..g.layout.len)) {
                    let piece = piece?;
                    let n = piece.dims().numel();
                    self.cast(&piece, &to.tensor.range(end, n)?)?;
                    end += n;
                }
                Ok(to)
            };
            let master = whole(&g.master, Role::Weight)?;
            let ema = g.ema.as_ref().map(|ema| whole(ema, Role::Ema)).transpose()?;
            (self.groups[i].master, self.groups[i].ema) = (master, ema);
        }
        if self.sharing.rank == 0 {
            self.sharing = Sharing::ALONE;
        }
        Ok(())
    }

    /// What ranks share of these elements of a group, in turn, from all ranks and on the device.
    pub(super) fn gathered<'a>(
        &'a self,
        g: &'a Store,
        from: &'a Tensor,
        form: Form,
        elements: &'a Range<usize>,
    ) -> impl Iterator<Item = Result<Tensor>> + 'a {
        let s = &self.sharing;
        let pieces = if form == Form::Whole { vec![] } else { g.pieces(s) };
        let wanted = move |p: &Range<usize>| elements.start.max(p.start)..elements.end.min(p.end);
        let touched = pieces.into_iter().filter(move |p| !wanted(p).is_empty());
        touched.map(move |piece| {
            // Relative to the piece, whose parts have n elements.
            let (n, wanted) = (piece.len() / s.ranks, wanted(&piece));
            let wanted = wanted.start - piece.start..wanted.end - piece.start;
            let (first, last) = (wanted.start / n, (wanted.end - 1) / n);
            // All ranks give the same window of their parts: as little as possible if it is in one part.
            let window = if first == last { wanted.start % n..(wanted.end - 1) % n + 1 } else { 0..n };
            let own = s.own(form, &piece).start + window.start;
            let own = from.range(own, window.len())?;
            let all = Tensor::empty(&*self.dev, Role::Activation, from.dtype(), [s.ranks * window.len()])?;
            self.dev.collectives().all_gather(Stream::COMPUTE, own.view(), all.out())?;
            let start = if first == last { first * window.len() } else { wanted.start };
            all.range(start, wanted.len())
        })
    }

    /// The values of some elements of a group on the host, from all ranks.
    pub(super) fn collect(
        &self,
        g: &Store,
        from: &Tensor,
        form: Form,
        elements: Range<usize>,
    ) -> Result<Vec<f64>> {
        if form == Form::Whole {
            return at(from, elements)?.to_f64(&*self.dev);
        }
        let mut values = Vec::with_capacity(elements.len());
        for part in self.gathered(g, from, form, &elements) {
            values.extend(part?.to_f64(&*self.dev)?);
        }
        Ok(values)
    }

    /// Where this rank keeps some elements of a group in a tensor.
    pub(super) fn places(
        &self,
        g: &Store,
        tensor: &Tensor,
        form: Form,
        elements: Range<usize>,
    ) -> Result<Places> {
        if form == Form::Whole {
            return Ok(vec![(0..elements.len(), at(tensor, elements)?)]);
        }
        let mut all = Vec::new();
        for piece in g.pieces(&self.sharing) {
            let part = self.sharing.part(&piece);
            let own = elements.start.max(part.start)..elements.end.min(part.end);
            if own.is_empty() {
                continue;
            }
            let start = self.sharing.own(form, &piece).start + own.start - part.start;
            let of = own.start - elements.start..own.end - elements.start;
            all.push((of, tensor.range(start, own.len())?));
        }
        Ok(all)
    }
}
