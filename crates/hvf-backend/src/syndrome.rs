//! What a guest was doing when it left: the exception syndrome.
