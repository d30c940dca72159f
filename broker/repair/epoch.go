package repair

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// NewEpoch makes the epoch of a writer that starts now. Of two the one that
// sorts first is the older, as far as the clocks can be trusted.
func NewEpoch() string {
	const random = 36 * 36 * 36 * 36
	ms := strconv.FormatInt(max(0, payload.Millis(time.Now())), 36)
	return fmt.Sprintf("%09s%04s", ms, strconv.FormatInt(rand.Int64N(random), 36))
}

// older tells whether the payload is an earlier rev of the same object.
func older(p, than []byte) bool {
	var a, b struct {
		UID string `json:"uid"`
		Rev int64  `json:"rev"`
	}
	if len(p) == 0 || len(than) == 0 || json.Unmarshal(p, &a) != nil || json.Unmarshal(than, &b) != nil {
		return false
	}
	return a.UID == b.UID && a.Rev < b.Rev
}
