package httpkeys

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

func TestEveryKindHasAStatus(t *testing.T) {
	for kind := range admission.NumKinds {
		require.GreaterOrEqual(t, statusOf[kind], http.StatusBadRequest, kind.Reason())
	}
}
