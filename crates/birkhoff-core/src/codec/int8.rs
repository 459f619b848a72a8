//! Eight bits a weight: the code is the int8 value itself, under the same scales.
