"""Building blocks: norm, rotary embedding, mixers, feed-forwards, language-model head."""
