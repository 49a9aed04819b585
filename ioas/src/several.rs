//! `Several`: a list that nearly always has one entry, and then allocates nothing.
//!
//! The memory of a mapping is nearly always one run, an unmap takes one area, a release ends one extent. What comes
//! after the first entry lies in a vector. (smallvec keeps its entries in one slice, at the price of a union that the
//! compiler cannot see through.)

/// Entries in order.
#[derive(Debug)]
pub(crate) struct Several<T> {
    /// `None` only when there are none at all.
    first: Option<T>,
    #[expect(clippy::box_collection, reason = "one word to look at where there is nothing more")]
    rest: Option<Box<Vec<T>>>,
}

impl<T> Several<T> {
    #[inline(always)]
    pub(crate) const fn new() -> Self {
        Self { first: None, rest: None }
    }

    #[inline(always)]
    pub(crate) const fn one(entry: T) -> Self {
        Self { first: Some(entry), rest: None }
    }

    #[inline(always)]
    pub(crate) fn push(&mut self, entry: T) {
        if self.first.is_none() {
            self.first = Some(entry);
        } else {
            self.push_more(entry);
        }
    }

    #[cold]
    fn push_more(&mut self, entry: T) {
        self.rest.get_or_insert_default().push(entry);
    }

    #[inline(always)]
    pub(crate) const fn first(&self) -> Option<&T> {
        self.first.as_ref()
    }

    /// The entry, if there is just one.
    #[inline(always)]
    pub(crate) fn single(&self) -> Option<&T> {
        if self.rest.is_none() { self.first.as_ref() } else { None }
    }

    /// The entry, if there is just one; else all.
    #[inline(always)]
    pub(crate) fn into_single(self) -> Result<T, Self> {
        match self {
            Self { first: Some(entry), rest: None } => Ok(entry),
            all => Err(all),
        }
    }

    #[inline(always)]
    pub(crate) const fn iter(&self) -> Iter<'_, T> {
        Iter { list: self, at: 0 }
    }

    /// Gives the entries to `each`.
    #[inline(always)]
    pub(crate) fn into_each(self, mut each: impl FnMut(T)) {
        if let Some(first) = self.first {
            each(first);
        }
        if let Some(rest) = self.rest {
            rest.into_iter().for_each(each);
        }
    }

    pub(crate) fn into_vec(self) -> Vec<T> {
        let mut all = Vec::with_capacity(1);
        self.into_each(|entry| all.push(entry));
        all
    }
}

/// The entries of a list, seen.
#[derive(Debug)]
pub(crate) struct Iter<'a, T> {
    list: &'a Several<T>,
    at: usize,
}

impl<'a, T> Iterator for Iter<'a, T> {
    type Item = &'a T;

    #[inline(always)]
    fn next(&mut self) -> Option<&'a T> {
        let at = self.at;
        self.at += 1;
        match (at.checked_sub(1), &self.list.rest) {
            (None, _) => self.list.first.as_ref(),
            (Some(_), None) => None,
            (Some(at), Some(rest)) => rest.get(at),
        }
    }
}

impl<T> Default for Several<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> FromIterator<T> for Several<T> {
    fn from_iter<I: IntoIterator<Item = T>>(entries: I) -> Self {
        let mut all = Self::new();
        entries.into_iter().for_each(|entry| all.push(entry));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::Several;

    #[test]
    fn entries_stay_in_order_however_they_came() {
        let mut list = Several::one(0);
        (1..4).for_each(|entry| list.push(entry));
        assert_eq!((list.first(), list.single()), (Some(&0), None));
        assert!(list.iter().copied().eq(0..4));
        assert_eq!(list.into_single().map_err(Several::into_vec), Err(vec![0, 1, 2, 3]));
        let one: Several<_> = (5..6).collect();
        assert_eq!((one.single(), one.iter().count()), (Some(&5), 1));
        assert_eq!(one.into_single().ok(), Some(5));
        let none = Several::<u8>::new();
        assert_eq!((none.first(), none.iter().next()), (None, None));
        assert_eq!(none.into_vec(), []);
    }
}
